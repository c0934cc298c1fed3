"""The text of the CUDA kernels compiled for the CPU, with the simulation of thread blocks in csrc/cuda/simulation.h."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

from dsft.ops import build, native

SOURCES = sorted((build.source_folder() / "cuda").glob("*.cu"))
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
"""In which order the threads of a block run between barriers."""
_FLAGS = ["-x", "c++", "-std=c++17", "-fPIC", "-shared", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def compiled(
    folder: Path, *flags: str, source: str = "cross_entropy_rows.cu", edit: tuple[str, str] | None = None
) -> Path:
    """The simulated library; ``edit``: some text of one file of csrc/cuda replaced by another, everywhere in it."""
    sources = SOURCES
    if edit is not None:
        copy = Path(shutil.copytree(build.source_folder(), folder / "csrc")) / "cuda"
        text = (copy / source).read_text()
        assert edit[0] in text
        (copy / source).write_text(text.replace(*edit))
        sources = [copy / path.name for path in SOURCES]
    library = folder / "libsimulated.so"
    command = [build.compiler(), *_FLAGS, *flags, *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return library


def load(library: Path) -> ctypes.CDLL:
    return native.with_cuda_types(ctypes.CDLL(str(library)))

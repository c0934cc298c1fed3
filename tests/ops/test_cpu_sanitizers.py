"""The CPU library under AddressSanitizer and UBSan: its operations' own tests, odd shapes, addresses and errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.ops import build

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = ["test_cross_entropy.py", "test_loss_grid.py", "test_pack.py", "test_loss_mask.py", "test_planning.py"]
LEFT_OUT = "not reference and not large and not further_apart and not opcheck and not imports_no_compiler"
"""Tests of Python alone, and those whose size, not whose shape, makes them interesting."""
SCRIPT = """
import sys
from pathlib import Path
import pytest
from hypothesis import settings
from dsft.ops import native

native.build_cpu_library = lambda: Path(sys.argv[1])
settings.register_profile("fewer", max_examples=30, deadline=None)
settings.load_profile("fewer")
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--capture=sys", "-m", "not slow", *sys.argv[2:]]))
"""


def sanitized(folder: Path, edit: tuple[str, str, str] | None = None) -> Path:
    """The library of csrc/cpu with both sanitizers; ``edit``: (file, old, new) of a copy of csrc."""
    sources = Path(shutil.copytree(build.source_folder(), folder / "csrc"))
    if edit is not None:
        path = sources / edit[0]
        assert edit[1] in path.read_text()
        path.write_text(path.read_text().replace(*edit[1:]))
    library = folder / "libdsft_cpu.so"
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-DDSFT_NO_CLONES"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    files = map(str, sorted((sources / "cpu").glob("*.cpp")))
    command = ["g++", *flags, *files, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return library


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process that has the sanitizer's runtime, with the operations of ``library``."""
    preloaded = [  # the second: the first cannot pass C++ exceptions on if it finds none who throws them
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environ = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", SCRIPT, str(library), *arguments]
    return subprocess.run(
        command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False
    )


needs_gcc = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs gcc's sanitizers")


@needs_gcc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_error_under_sanitizers(tmp_path: Path) -> None:
    done = run(sanitized(tmp_path), *(str(REPOSITORY / "tests" / "ops" / name) for name in TESTS), "-k", LEFT_OUT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "passed" in done.stdout
    assert "runtime error" not in done.stderr


@needs_gcc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_sanitizers_bite(tmp_path: Path) -> None:
    edit = ("cpu/cross_entropy_rows.cpp", "j < rows.vocab; ++j)", "j <= rows.vocab; ++j)")
    test = REPOSITORY / "tests" / "ops" / "test_loss_grid.py::test_targets_at_the_borders_of_blocks"
    done = run(sanitized(tmp_path, edit), str(test))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr

"""Build dsft's native libraries into a private cache folder: one for the CPU, one for CUDA where nvcc is.

The folder is named by a hash of the sources, the flags and the compiler, so another version never meets an old build,
and a build is never changed once it is there. Processes that start together wait for one of them under an flock, which
the system releases when its owner dies: a killed build cannot hang a later run. The library appears by rename.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft import fsio
from dsft.errors import KernelError

logger = logging.getLogger(__name__)

PREBUILT_FOLDER = "_lib"
"""Inside the package, in a wheel."""
CPU_LIBRARY = "libdsft_cpu.so"
CPU_ARCHITECTURES = ("x86-64", "x86-64-v3", "x86-64-v4")
"""Versions of the loss's loops in one library on x86-64 with GCC (DSFT_CLONES in csrc/cpu); elsewhere the plain one."""
# No -march=native: one home folder, and so one cache, often serves hosts with different processors.
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # What loops need to become vector instructions; none of them changes the value of an expression.
    *("-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"),
)
CUDA_LIBRARY = "libdsft_cuda.so"
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100")
_CUDA_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"),
    *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES),
    f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}",  # PTX for newer devices
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NINJA_FILE = """\
ninja_required_version = 1.5
rule library
  command = {compiler} {flags} $in -o $out
  description = building $out
build {library}: library {sources}
"""


def source_folder() -> Path:
    """Folder of the C++ sources: inside the installed package, or of the checkout.

    Raises:
        KernelError: there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_csrc", package.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise KernelError(
        f"the sources of dsft's native operations are neither in {package / '_csrc'} nor in {package.parent / 'csrc'}: "
        "the installation is not whole. Install dsft again, or set kernels: reference."
    )


def cache_folder() -> Path:
    """Where builds are kept: ``$DSFT_CACHE_DIR``, or ``~/.cache/dsft``."""
    configured = os.environ.get("DSFT_CACHE_DIR")
    return Path(configured) if configured else Path.home() / ".cache" / "dsft"


def compiler() -> str:
    """Path of the C++ compiler: ``$CXX``, c++ or g++.

    Raises:
        KernelError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++"):
        if name and (path := shutil.which(name)):
            return path
    raise KernelError(
        "no C++ compiler was found ($CXX, c++, g++) to build dsft's native operations. Install one (Debian: g++), or "
        "set kernels: reference."
    )


def cuda_compiler() -> str:
    """Path of nvcc: ``$CUDA_HOME/bin/nvcc`` or nvcc.

    Raises:
        KernelError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    for name in (home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and (path := shutil.which(name)):
            return path
    raise KernelError(
        "nvcc was not found ($CUDA_HOME/bin, PATH, /usr/local/cuda/bin) to build dsft's CUDA operations. Install the "
        "CUDA toolkit, or set kernels: reference."
    )


def prebuilt(name: str) -> Path | None:
    """The library of this name that came with the wheel; None where there is none."""
    path = Path(__file__).resolve().parents[1] / PREBUILT_FOLDER / name
    return path if path.exists() else None


def cpu_library_path() -> Path:
    """Where the library that came with the wheel is; else where that of these sources, flags and compiler will be.

    Raises:
        KernelError: no sources or no compiler.
    """
    return prebuilt(CPU_LIBRARY) or _path(CPU_LIBRARY, compiler(), _FLAGS, "cpu")


def cuda_library_path() -> Path:
    """Where the CUDA library that came with the wheel is; else where that of these sources, flags and nvcc will be.

    Raises:
        KernelError: no sources or no nvcc.
    """
    return prebuilt(CUDA_LIBRARY) or _path(CUDA_LIBRARY, cuda_compiler(), _CUDA_FLAGS, "cuda")


def _path(name: str, program: str, flags: tuple[str, ...], subfolder: str) -> Path:
    folder = source_folder()
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for part in (program, version, platform.machine(), *flags):
        digest.update(part.encode() + b"\0")
    for path in sorted([*(folder / "core").glob("*.h"), *(folder / subfolder).glob("*.[ch]*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return cache_folder() / "ops" / digest.hexdigest()[:20] / name


def build_cpu_library() -> Path:
    """Path of ``libdsft_cpu.so``, built if it is not there yet. Safe to call from many processes at once.

    Raises:
        KernelError: it cannot be built (with the compiler's output), or the cache folder is another user's.
        SaveError: the cache folder cannot be written.
    """
    return prebuilt(CPU_LIBRARY) or _built(cpu_library_path(), compiler(), _FLAGS, "cpu/*.cpp")


def build_cuda_library() -> Path:
    """Path of ``libdsft_cuda.so``, built if it is not there yet (minutes). Safe to call from many processes at once.

    Raises:
        KernelError: no nvcc, it cannot be built (with nvcc's output), or the cache folder is another user's.
        SaveError: the cache folder cannot be written.
    """
    return prebuilt(CUDA_LIBRARY) or _built(cuda_library_path(), cuda_compiler(), _CUDA_FLAGS, "cuda/*.cu")


def build_ahead(folder: Path, *, cuda: bool) -> None:
    """Build into a folder that becomes ``dsft/_lib`` of a wheel.

    Raises:
        KernelError: no compiler, or it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _build(folder / CPU_LIBRARY, compiler(), _FLAGS, sorted(source_folder().glob("cpu/*.cpp")))
    if cuda:
        _build(folder / CUDA_LIBRARY, cuda_compiler(), _CUDA_FLAGS, sorted(source_folder().glob("cuda/*.cu")))


def _built(library: Path, program: str, flags: tuple[str, ...], pattern: str) -> Path:
    if not library.exists():
        _make_private(library.parent)
        with _locked(library.parent):
            if not library.exists():
                logger.info("building %s into %s", library.name, library.parent)
                _build(library, program, flags, sorted(source_folder().glob(pattern)))
    return library


def _build(library: Path, program: str, flags: tuple[str, ...], sources: list[Path]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        (Path(work) / "build.ninja").write_text(
            _NINJA_FILE.format(
                compiler=_escaped(program),
                flags=" ".join(flags),
                library=library.name,
                sources=" ".join(_escaped(str(path)) for path in sources),
            )
        )
        result = subprocess.run([_ninja(), "-C", work], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise KernelError(
                f"dsft's native operations could not be built with {program}. Mend the compiler (or choose another "
                f"with $CXX or $CUDA_HOME), or set kernels: reference. Its output:\n{result.stdout}{result.stderr}"
            )
        fsio.write_bytes(library, (Path(work) / library.name).read_bytes())


def _ninja() -> str:
    import ninja

    beside = Path(ninja.BIN_DIR) / "ninja"
    return str(beside) if beside.exists() else (shutil.which("ninja") or f"{sys.prefix}/bin/ninja")


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _make_private(folder: Path) -> None:
    """Make the folder for this user alone: a library in it is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise fsio.save_error(folder, error) from error
    if owner != os.getuid():
        raise KernelError(
            f"{folder} belongs to another user (uid {owner}), so code in it is not loaded. Set DSFT_CACHE_DIR to a "
            "folder of your own."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Where the file system has none, building twice is harmless: the rename is atomic."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that builds %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise fsio.save_error(folder / "lock", error) from error
        yield

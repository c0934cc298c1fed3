"""DeepSpeed's own native ops, built ahead and loaded without the lock that can hang a run for ever.

torch.utils.cpp_extension guards a build folder, also when it only loads what is built, by a file ``lock`` that nobody
removes when its process is killed: every later start then waits without a word. So here

- an op is built by a child process in a folder of its own, which gets its final name only when the op is whole; an
  flock, which the kernel drops at any death, keeps a second builder out, and the child holds it too, so that killing
  the run does not lose the build;
- a built op is imported from its file and handed to DeepSpeed, which then never comes near a lock;
- ops that DeepSpeed builds by itself later go to a private TORCH_EXTENSIONS_DIR of this host (or the user's), from
  which locks that no living process holds are removed first.

``python -m dsft.launch.native_ops [names]`` builds them ahead (``make install`` does).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from dsft.dist import DeviceType
from dsft.errors import LaunchError
from dsft.fsio import fsync_folder

logger = logging.getLogger(__name__)

BUILDERS = {
    "deepspeed_shm_comm": "ShareMemCommBuilder",
    "cpu_adam": "CPUAdamBuilder",
    "fused_adam": "FusedAdamBuilder",
    "async_io": "AsyncIOBuilder",
    "pin_memory": "PinMemoryBuilder",
}
"""Op -> DeepSpeed's builder class."""
LINKED_AGAINST = {"async_io": "pin_memory"}
"""Op -> the op whose symbols its library uses, loaded before it."""
LIBAIO_HINT = (
    "NVMe offload needs libaio with its header: install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, RHEL), or "
    "say in CFLAGS and LDFLAGS where it is; without it, offload to cpu instead of nvme"
)
PROGRESS_SECONDS = 5.0
LOG_NAME = "build.log"
Progress = Callable[[str], None]


def needed_ops(device_type: DeviceType, *, cpu_adam: bool, nvme: bool = False) -> tuple[str, ...]:
    """The ops a run needs from DeepSpeed, in the order in which they are loaded.

    Args:
        device_type: where the ranks compute; on the CPU they use DeepSpeed's own collectives.
        cpu_adam: the optimizer runs on the host.
        nvme: optimizer states or weights are offloaded to NVMe.
    """
    shm = ("deepspeed_shm_comm",) if device_type == "cpu" else ()
    return shm + (("cpu_adam",) if cpu_adam else ()) + (("pin_memory", "async_io") if nvme else ())


def cache_folder(device_type: DeviceType) -> Path:
    """``<DSFT_CACHE_DIR or ~/.cache/dsft>/deepspeed-ops/<key>``, private to user, versions, device and processor."""
    root = Path(os.environ.get("DSFT_CACHE_DIR") or Path.home() / ".cache" / "dsft")
    key = (
        f"u{os.getuid()}-py{sys.version_info[0]}{sys.version_info[1]}-torch{version('torch')}-"
        f"deepspeed{version('deepspeed')}-{device_type}-{_hardware()}"
    )
    return root / "deepspeed-ops" / key


def set_extensions_folder(device_type: DeviceType, progress: Progress = logger.info) -> Path:
    """Point TORCH_EXTENSIONS_DIR at a private folder of this host unless the user set one, and free it of dead locks.

    Call it before DeepSpeed is imported.

    Raises:
        LaunchError: the folder cannot be made.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_folder(device_type) / f"jit-{socket.gethostname()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / ".dsft.flock", f"another start to check {folder}", progress):
            for lock in sorted(folder.glob("*/lock")):
                _clear_lock(lock, progress)
    except OSError as error:
        raise _cannot_cache(folder, error) from error
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


def prepare_deepspeed_ops(
    names: Iterable[str], device_type: DeviceType, progress: Progress = logger.info
) -> dict[str, Path]:
    """Build what is not built yet and load every op into DeepSpeed. Each rank calls it; one a host builds.

    Returns:
        The library of each op that did not come compiled with DeepSpeed.

    Raises:
        LaunchError: the cache folder cannot be written, or the compiler failed (its last lines are in the message).
    """
    set_extensions_folder(device_type, progress)
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    _import_deepspeed()
    own = [name for name in names if not _came_with_deepspeed(name)]
    libraries = {name: build_op(name, device_type, progress) for name in own}
    for name, library in libraries.items():
        _hand_to_deepspeed(name, library)
    return libraries


def build_op(name: str, device_type: DeviceType, progress: Progress = logger.info) -> Path:
    """The library of one op, built by a child process unless it is there. Waits, saying so, for a builder at work."""
    assert name in BUILDERS, name
    folder = cache_folder(device_type)
    library = folder / name / f"{name}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / f".{name}.flock", f"another process to build DeepSpeed's {name}", progress) as lock:
            if not library.exists():
                _build(folder, name, device_type, lock, progress)
    except OSError as error:
        raise _cannot_cache(folder, error) from error
    return library


def _build(folder: Path, name: str, device_type: DeviceType, lock: int, progress: Progress) -> None:
    """Run the child under the flock; both are gone, and the flock with them, before another builder may begin."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    staging.mkdir()
    log = folder / f".{name}.{LOG_NAME}"
    command = [sys.executable, "-m", "dsft.launch.native_ops", "--build-into", str(staging), name]
    environ = {**os.environ, "TORCH_EXTENSIONS_DIR": str(staging), "DS_ACCELERATOR": device_type}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environ.pop(variable, None)  # the child is not a rank
    started = time.monotonic()
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C and a launcher's kill end the run, not the build
        )  # fmt: skip
        while True:
            try:
                code = child.wait(timeout=PROGRESS_SECONDS)
                break
            except subprocess.TimeoutExpired:
                progress(
                    f"building DeepSpeed's {name} (once per machine and version): {time.monotonic() - started:.0f} s"
                )
    if code == LaunchError.exit_code:  # the child says by itself what is missing
        raise LaunchError(log.read_text(errors="replace").strip().splitlines()[-1])
    if code != 0:
        raise LaunchError(
            f"DeepSpeed's native op {name} could not be built (exit code {code}); the whole output is in {log}. Its "
            f"last lines: {_last_lines(log)!r}. A C++ compiler and Python's headers are needed; `make install` builds "
            "the ops ahead."
        )
    progress(f"built DeepSpeed's {name} in {time.monotonic() - started:.0f} s")


def _build_into(staging: Path, name: str) -> None:
    """In the child: let DeepSpeed build into ``staging``, then give the op's folder its final name."""
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    builder = accelerator.create_op_builder(BUILDERS[name])
    if builder is None:
        raise LaunchError(f"DeepSpeed has no op {name} for the device {accelerator.device_name()}.")
    has_compiler = builder.has_function("malloc", ())  # without one, the build's own error says more
    if name == "async_io" and has_compiler and not builder.has_function("io_submit", ("aio",)):
        raise LaunchError(f"DeepSpeed's native op {name} cannot be built on {socket.gethostname()}: {LIBAIO_HINT}.")
    other = LINKED_AGAINST.get(name)
    if other is not None and not _came_with_deepspeed(other):  # else DeepSpeed would build it here once more
        _hand_to_deepspeed(other, build_op(other, accelerator.device_name(), _say))
    builder.load(verbose=True)
    built = staging / name
    library = built / f"{name}.so"
    if not library.exists():
        raise LaunchError(
            f"DeepSpeed said that it built {name}, but {library} is not there; please report its version."
        )
    descriptor = os.open(library, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    try:
        built.rename(staging.parent / name)
    except OSError:
        if not (staging.parent / name / library.name).exists():
            raise  # otherwise another host, on a shared folder without flock, was faster with the same op
    fsync_folder(staging.parent)
    shutil.rmtree(staging, ignore_errors=True)


def _import_deepspeed() -> None:
    """Import DeepSpeed as if MLflow were not installed.

    DeepSpeed 0.19.8 imports it for its autotuner, which dsft does not use: 1.5 of the 10.6 s of a start's imports.
    """
    if "mlflow" in sys.modules:
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # what import takes for "there is no such module"
    try:
        importlib.import_module("deepspeed")
    finally:
        del sys.modules["mlflow"]


def _came_with_deepspeed(name: str) -> bool:
    """DeepSpeed was installed with this op compiled in (DS_BUILD_OPS=1); it then imports it without a lock."""
    return bool(importlib.import_module("deepspeed.git_version_info").installed_ops.get(name, False))


def _hand_to_deepspeed(name: str, library: Path) -> None:
    """Import the library and put it where DeepSpeed's builders look before they would build or take a lock."""
    loaded = importlib.import_module("deepspeed.ops.op_builder.builder").OpBuilder._loaded_ops
    if name in loaded:
        return
    if name in LINKED_AGAINST:  # DeepSpeed's own function makes the symbols of the library it finds loaded global
        importlib.import_module("deepspeed.ops.op_builder.pin_memory").PinMemoryBuilder().load()
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        what_to_do = f"Delete the folder {library.parent}; the next start builds it again."
        if "libaio" in str(error):  # built on another host, which has it
            what_to_do = f"On {socket.gethostname()}, {LIBAIO_HINT}."
        raise LaunchError(f"DeepSpeed's native op {library} cannot be loaded ({error}). {what_to_do}") from error
    loaded[name] = module


@contextmanager
def _exclusive(path: Path, what: str, progress: Progress) -> Iterator[int]:
    """Hold an flock; says what it waits for."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        started, said = time.monotonic(), time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    progress(f"waiting for {what}: {said - started:.0f} s")
                time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def _clear_lock(lock: Path, progress: Progress) -> None:
    """Remove a build lock that no process has open; wait for one that is held (torch keeps it open while it builds)."""
    started, said = time.monotonic(), time.monotonic()
    while lock.exists():
        holder = _holder(lock)
        if holder is None:
            lock.unlink(missing_ok=True)
            progress(f"removed {lock}, left by a process that was killed")
            return
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            progress(f"waiting for process {holder} to finish building {lock.parent}: {said - started:.0f} s")
        time.sleep(0.1)


def _holder(lock: Path) -> int | None:
    """Id of a process on this host that has the file open. Other users' processes cannot be looked into."""
    try:
        wanted = lock.stat()
    except FileNotFoundError:
        return None
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = descriptor.stat()
        except OSError:
            continue  # the process or descriptor is gone, or is not ours
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return int(descriptor.parts[2])
    return None


def _hardware() -> str:
    """Hash of what decides the compiled code: the processor's instructions, and the models of GPUs that are there."""
    lines: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines |= {line for line in cpuinfo.read_text().splitlines() if line.lower().startswith(("flags", "features"))}
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines |= {line for line in information.read_text().splitlines() if line.startswith("Model")}
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(sorted(lines)).encode()).hexdigest()[:8]}"


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-3:])[-600:]


def _cannot_cache(folder: Path, error: OSError) -> LaunchError:
    return LaunchError(
        f"cannot use {folder} for DeepSpeed's native ops: {error.strerror or error}. Set DSFT_CACHE_DIR to a folder "
        "on a local disk that you can write."
    )


def main(arguments: Sequence[str]) -> None:
    """``[--cuda] [names]``: build ahead; ``--build-into FOLDER NAME``: the child of :func:`build_op`."""
    if arguments[:1] == ["--build-into"]:
        _build_into(Path(arguments[1]), arguments[2])
        return
    device_type: DeviceType = "cuda" if arguments[:1] == ["--cuda"] else "cpu"
    names = [name for name in arguments if name != "--cuda"] or list(needed_ops(device_type, cpu_adam=True))
    unknown = sorted(set(names) - set(BUILDERS))
    if unknown:
        raise LaunchError(f"there is no op called {unknown[0]!r}; known ones are {', '.join(BUILDERS)}.")
    for name in names:
        if _came_with_deepspeed(name):
            continue
        library = build_op(name, device_type, progress=_say)
        _say(f"{name}: {library}")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LaunchError as failure:
        _say(str(failure))
        sys.exit(failure.exit_code)

"""What one host says of itself: a program that is sent over ssh, or to every node by srun, and prints one line of JSON.

It imports nothing but Python's own library and is sent as text, so that it reports from a host without dsft, or with a
broken environment, too. ``python - '{...}' < probe.py``; what the request holds is in :func:`report`. It judges
nothing.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARK = "DSFT-PROBE "
"""Stands before the JSON, because a login shell may print, too."""
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
_SECOND_LOOK_SECONDS = 1.0
_SIOCGIFADDR, _SIOCGIFFLAGS, _IFF_UP = 0x8915, 0x8913, 1


def report(request: dict[str, Any]) -> dict[str, Any]:
    """Everything about this host.

    Args:
        request: ``number`` of the host (null: as SLURM says), ``nonce`` in the names of the files that show whether a
            folder is shared, ``folders`` that must be, ``files`` that must be the same everywhere, ``local_dir`` and
            ``run_dir`` of a run that saves to disks of the hosts (null: it does not), ``search`` (where Python finds
            dsft and its packages), ``first`` (name of the host of rank 0), ``port`` (wanted there, or null), ``cache``
            (of dsft) and ``extensions`` (of torch), null for their usual places.
    """
    began = time.time()
    number = int(os.environ["SLURM_NODEID"]) if request["number"] is None else request["number"]
    sys.path[:0] = request["search"]
    cache = request["cache"] or os.path.expanduser("~/.cache/dsft")
    return {
        "number": number,
        "hostname": socket.gethostname(),
        "began": began,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": _torch_cuda(),
        "nccl": _nccl(),
        "code": _code(),
        "files": {path: _sha256(path) for path in request["files"]},
        "folders": {folder: _folder(folder, request["nonce"], number) for folder in request["folders"]},
        "local_dir": None if request["local_dir"] is None else _local_dir(request["local_dir"], request["run_dir"]),
        "gpus": _gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _available_bytes(),
        "shm_bytes": _free_bytes("/dev/shm"),
        "memlock_bytes": _memlock(),
        "interfaces": _interfaces(),
        "first": _route_to(request["first"]),
        "ssh": os.environ.get("SSH_CONNECTION", "").split(),
        "is_port_free": None if request["port"] is None else _is_free(request["port"]),
        "free_port": _free_port(),
        "ops": sorted({os.path.basename(path)[:-3] for path in glob.glob(f"{_ops_folder(cache)}/*/*.so")}),
        "locks": _locks(cache, request["extensions"]),
        "libaio": _has_libaio(),
        "ended": time.time(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """The CUDA that torch was built for, from its text: an import would take seconds."""
    try:
        text = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py"))).read_text()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    found = re.search(r"^cuda.*= '([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def _nccl() -> str | None:
    return next((found for major in (13, 12, 11) if (found := _version(f"nvidia-nccl-cu{major}"))), None)


def _code() -> str | None:
    """Hash of the Python files of dsft; null: there is none."""
    spec = importlib.util.find_spec("dsft")
    if spec is None or not spec.submodule_search_locations:
        return None
    (root,) = list(spec.submodule_search_locations)[:1]
    digest = hashlib.sha256()
    for path in sorted(glob.glob(f"{root}/**/*.py", recursive=True)):
        with open(path, "rb") as file:
            digest.update(os.path.relpath(path, root).encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()[:16]


def _sha256(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError:
        return None


def _folder(folder: str, nonce: str, number: int) -> dict[str, Any]:
    """Whether the file of whoever asks is there, whether one of this host can be written, and the free space."""
    result: dict[str, Any] = {
        "exists": os.path.isdir(folder),
        "sees": os.path.exists(f"{folder}/.dsft-{nonce}"),
        "error": None,
    }
    try:
        with open(f"{folder}/.dsft-{nonce}-{number}", "xb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        result["error"] = error.strerror
    return {**result, "free_bytes": _free_bytes(folder)}


def _local_dir(folder: str, run_dir: str) -> dict[str, Any]:
    """Whether it can be written, how much is free, and whether the run folder is on the same file system."""
    result: dict[str, Any] = {"error": None, "is_on_run_dir": False}
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        result["is_on_run_dir"] = os.path.isdir(run_dir) and os.stat(folder).st_dev == os.stat(run_dir).st_dev
    except OSError as error:
        result["error"] = error.strerror
    return {**result, "free_bytes": _free_bytes(folder)}


def _free_bytes(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _gpus() -> list[list[str]]:
    """Name, memory and free memory in MiB, and driver of each NVIDIA device."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[word.strip() for word in line.split(",")] for line in answer.splitlines() if line.strip()]


def _available_bytes() -> int:
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    try:  # of a container
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            return min(available, int(most.read()) - int(now.read()))
    except (OSError, ValueError):  # none, or "max"
        return available


def _memlock() -> int | None:
    """Memory that a process may lock; null: no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _interfaces() -> dict[str, str]:
    """IPv4 address of each interface that is up."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                (flags,) = struct.unpack("16xH", fcntl.ioctl(probe, _SIOCGIFFLAGS, request)[:18])
                address = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
            except OSError:  # it has none
                continue
            if flags & _IFF_UP:
                found[name] = address
    return found


def _route_to(name: str) -> dict[str, str | None]:
    """What the host of rank 0 is called in numbers here, and this host's own address on the way there."""
    try:
        address = socket.gethostbyname(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            return {"address": address, "own": probe.getsockname()[0]}
    except OSError:
        return {"address": None, "own": None}


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that only lingers does not count
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _has_libaio() -> bool:
    """Whether DeepSpeed's async_io could be compiled: its header is in a usual place, or flags name another one."""
    folders = ("/usr/include", "/usr/local/include", f"{sys.prefix}/include", *os.environ.get("CPATH", "").split(":"))
    return "CFLAGS" in os.environ or any(os.path.exists(f"{folder}/libaio.h") for folder in folders)


def _ops_folder(cache: str) -> str:
    """Pattern of the folder of dsft's cache that holds DeepSpeed's ops for these versions (see native_ops)."""
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    versions = f"torch{_version('torch')}-deepspeed{_version('deepspeed')}"
    return f"{glob.escape(cache)}/deepspeed-ops/u{os.getuid()}-{python}-{versions}-*"


def _locks(cache: str, extensions: str | None) -> dict[str, int | None]:
    """Lock files of op builds, and the process that holds each; null: none on this host.

    torch closes a lock before it removes it, and a process that only loads an op takes one for a moment: a lock that
    nobody holds counts if the same file is still there, and still nobody's, at a second look.
    """
    usual = ("~/.cache/torch_extensions/*", f"{glob.escape(cache)}/deepspeed-ops/*/jit-{socket.gethostname()}")
    folders = [glob.escape(extensions)] if extensions else [os.path.expanduser(folder) for folder in usual]
    seen = {lock: _born(lock) for folder in folders for lock in sorted(glob.glob(f"{folder}/*/lock"))}
    found = {lock: _holder(lock) for lock in seen}
    if None in found.values():
        time.sleep(_SECOND_LOOK_SECONDS)
        found = {lock: holder or _holder(lock) for lock, holder in found.items()}
    return {lock: holder for lock, holder in found.items() if holder or (seen[lock] and seen[lock] == _born(lock))}


def _born(lock: str) -> tuple[int, int] | None:
    """What tells a file from another of the same name; null: it is gone."""
    try:
        status = os.stat(lock)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _holder(lock: str) -> int | None:
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.path.samefile(descriptor, lock):
                return int(descriptor.split("/")[2])
        except OSError:
            continue
    return None


if __name__ == "__main__":
    sys.stdout.write(MARK + json.dumps(report(json.loads(sys.argv[1]))) + "\n")

"""Out of memory, named: an allocation of this process that failed, and other processes that the kernel has killed."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import psutil

from dsft.errors import OutOfMemoryError

_VMSTAT = Path("/proc/vmstat")
_KILLED_CODES = (-signal.SIGKILL, 256 - signal.SIGKILL, 128 + signal.SIGKILL)
"""Of a process that SIGKILL has ended: for its parent, of a Python launcher that passes that on, of a shell."""
_GIB = 2**30


def num_oom_kills() -> int | None:
    """Processes that the kernel of this host has killed for memory since it started, whether all of the host's was used
    up or that of a cgroup (a container, a SLURM job); None: it does not say."""
    try:
        lines = _VMSTAT.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def why_killed(exit_code: int, oom_kills_before: int | None) -> str | None:
    """What the end of a run without an error of its own means, for a person; None: nothing points to memory.

    Args:
        exit_code: of the launcher.
        oom_kills_before: :func:`num_oom_kills` before the run was started.
    """
    now = num_oom_kills()
    if now is not None and oom_kills_before is not None and now > oom_kills_before:
        return (
            f"out of memory: the kernel of {socket.gethostname()} has killed {now - oom_kills_before} process(es) "
            "meanwhile because a memory limit was reached (its own, a container's or a SLURM job's; dmesg names them). "
            f"{_ADVICE}"
        )
    if exit_code in _KILLED_CODES:
        return (
            "a rank was ended by SIGKILL, which the kernel sends when memory is used up (see dmesg on its host), a "
            f"batch system at a limit, or a person. If it was memory: {_ADVICE}"
        )
    return None


def explained(error: BaseException) -> BaseException:
    """The error, or OutOfMemoryError in its place when it is a failed allocation, of host memory or a device's."""
    name, text = type(error).__name__, str(error)
    is_allocation = isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text
    if not is_allocation or isinstance(error, OutOfMemoryError):
        return error
    host, own = psutil.virtual_memory(), psutil.Process().memory_info()
    return OutOfMemoryError(
        f"out of memory: {name}{f': {text}' if text else ''}. This process holds {own.rss / _GIB:.1f} GiB of host "
        f"memory, and {host.available / _GIB:.1f} of {host.total / _GIB:.1f} GiB are free on "
        f"{socket.gethostname()}. {_ADVICE}"
    )


_ADVICE = (
    "Lower train.micro_batch_packs or data.pack_tokens, offload more (or less, to save host memory) in the DeepSpeed "
    "file, set model.activation_checkpointing, or use fewer ranks on a host; dsft estimate RUN.yaml says what will fit."
)

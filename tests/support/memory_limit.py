"""A memory limit for one process, kept by the kernel, which kills it beyond that. Needs root and a memory cgroup."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def _parent(limit_bytes: int) -> tuple[Path, dict[str, int]] | None:
    """Where a group may be made, and its limits in the order in which they must be set; None: nowhere.

    The limit of memory alone kills nobody where the machine has swap: what is beyond it goes there.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":  # memsw is the sum of both
            limits = {"memory.limit_in_bytes": limit_bytes, "memory.memsw.limit_in_bytes": limit_bytes}
            return _ROOT / "memory" / path.lstrip("/"), limits
        if controllers == "" and (_ROOT / "cgroup.controllers").exists():
            return _ROOT, {"memory.max": limit_bytes, "memory.swap.max": 0}
    return None


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path | None]:
    """A cgroup with a limit, removed at the end; None where this process may not make one.

    A process joins it when its id is written to ``cgroup.procs``; what it allocates from then on counts.
    """
    found = _parent(limit_bytes)
    if found is None:
        yield None
        return
    parent, limits = found
    group = parent / f"dsft-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        for name, value in limits.items():
            (group / name).write_text(str(value))
    except OSError:
        if group.exists():
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        _leave(group, parent)
        group.rmdir()


def _leave(group: Path, parent: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        assert int(pid) != os.getpid()
        (parent / "cgroup.procs").write_text(pid)

"""A memory limit for one process, kept by the kernel, which kills it beyond that. Needs root and a memory cgroup."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def _parent() -> tuple[Path, str] | None:
    """Where a group may be made, and the name of its limit; None: nowhere."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return _ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        if controllers == "" and (_ROOT / "cgroup.controllers").exists():
            return _ROOT, "memory.max"
    return None


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path | None]:
    """A cgroup with a limit, removed at the end; None where this process may not make one.

    A process joins it when its id is written to ``cgroup.procs``; what it allocates from then on counts.
    """
    found = _parent()
    if found is None:
        yield None
        return
    parent, limit = found
    group = parent / f"dsft-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / limit).write_text(str(limit_bytes))
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

"""Saving a bare engine, without a run around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsft.checkpoint.commit import save
from dsft.checkpoint.local_disk import LocalDisk
from dsft.checkpoint.manifest import WrittenFile
from dsft.checkpoint.retention import Keep
from dsft.checkpoint.snapshot import Snapshot, SnapshotMemory
from dsft.dist import Groups


def save_engine(engine: Any, staging: Path) -> Sequence[WrittenFile]:
    """Write this rank's part of an engine's state at once."""
    return Snapshot(engine, SnapshotMemory(0)).write(staging)


def save_step(engine: Any, folder: Path, step: int, groups: Groups, disk: LocalDisk | None = None) -> Path:
    """Save, and wait for it. Collective."""
    return save(
        folder,
        step,
        groups=groups,
        attempt="first",
        write_payload=lambda staging: save_engine(engine, staging),
        payload_bytes=0,
        state={"step": step},
        keep=Keep(last=9),
        disk=disk,
    )

"""From the disks of the hosts into the checkpoint's folder: afterwards it is like any other."""

from __future__ import annotations

from pathlib import Path

from dsft.checkpoint.opened import OpenCheckpoint
from dsft.fsio import atomic_file


def gather(checkpoint: Path) -> tuple[int, OpenCheckpoint]:
    """Copy the shards that lie on a disk of this host into a checkpoint's folder, in place of the links to them.

    Each block is checked on its way. Run it on each host that has some; it may run on several at once, and again.

    Returns:
        How many were copied, and the checkpoint, whose ``elsewhere()`` are the shards that are still missing.

    Raises:
        DamagedCheckpointError: a shard of this host is not what was written.
        SaveError: the folder cannot be written.
    """
    opened = OpenCheckpoint(checkpoint)
    num_copied = 0
    for name, file in opened.files.items():
        path = checkpoint / name
        if not (path.is_symlink() and path.exists()):
            continue
        with opened.open_blocks(name) as reader, atomic_file(path) as out:
            for piece in reader.pieces(0, file.num_bytes):
                out.write(piece)
        num_copied += 1
    return num_copied, opened

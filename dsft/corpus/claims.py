"""Which worker makes a shard: the first that locks its claim file. The system lets go of a killed worker's locks."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft.errors import SaveError
from dsft.fsio import save_error

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def claimed(folder: Path, shard: int, *, is_alone: bool) -> Iterator[bool]:
    """Keep a shard of a store for this worker until the end of the block; yields whether it was free.

    Where a file system keeps locks on one host only (NFS with local_lock, Lustre with localflock), two hosts may make
    one shard: slower, and the same bytes, for a shard is published by rename.

    Args:
        is_alone: nobody shares the work, so a file system without locks will do.

    Raises:
        SaveError: the folder cannot be written, or has no locks.
    """
    path = folder / f".shard-{shard:06d}.claim"
    try:
        file = open(path, "ab")  # noqa: SIM115  (closed below, after it is unlinked)
    except OSError as error:
        raise save_error(path, error) from error
    with file:
        is_mine = _lock(file.fileno(), path, is_alone)
        try:
            yield is_mine
        finally:
            if is_mine:
                path.unlink(missing_ok=True)


def _lock(descriptor: int, path: Path, is_alone: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))  # else who had it has just ended and removed it
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise save_error(path, error) from error
        if is_alone:
            return True
        raise SaveError(
            f"{path.parent}: this file system has no locks ({error.strerror}), by which several workers share the "
            "shards. Mount it with them (Lustre: -o flock), choose another data.store_dir, or prepare with one process."
        ) from error


def remove_claims(folder: Path) -> None:
    """Remove what killed workers left in a store that is whole."""
    for path in folder.glob(".shard-*.claim"):
        path.unlink(missing_ok=True)

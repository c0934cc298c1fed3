"""The only writer of files that must survive: temporary name in the same folder, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dsft.errors import SaveError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path`` whole, or not at all.

    The data is on the disk before the name is: a crash at any instant leaves either the old file or the new one.

    Raises:
        SaveError: no space, a read-only folder, or any other failure of the file system (names the path).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise save_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically. Raises SaveError as :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented, key-sorted JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a rename is only on the disk once its folder is)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_error(path: Path, error: OSError) -> SaveError:
    """Name the path, the cause and the remedy of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "there is no space left on that disk (or quota); free some, or choose another folder"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "the folder cannot be written; check its mount and permissions"
    else:
        advice = "check the file system"
    return SaveError(f"cannot write {path}: {error.strerror or error}. Nothing half-written was left; {advice}.")

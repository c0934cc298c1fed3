"""A folder on this machine that keeps files of remote token stores: bounded, and shared by threads, processes and jobs.

All agreement is through the folder, by ``flock``, which the kernel frees when a process ends in whatever way:

- who reads a file has it locked (shared) for as long as it is open or mapped, since a map keeps the file open;
- who fetches one has its temporary file locked, and one of the locks in ``locks/`` so that nobody fetches it as well;
- what nobody has locked may be removed: the least recently opened file where room is needed, and a temporary file at
  once, for its owner is gone. Room is made and taken under the lock ``locks/room``.

A file's name is of its content. It is compared with its hashes each time it is opened, so that what came wrong, was
cut by a crash or was damaged on the disk is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dsft.errors import DamagedFileError, DataError, SaveError
from dsft.fsio import atomic_file
from dsft.remote import open_remote, remote_size

logger = logging.getLogger(__name__)

MAX_FETCHES = 2
"""A file that came wrong so often is wrong where it lies."""

_ROOM = "room"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A remote file that the cache may hold.

    Attributes:
        name: what it is called in the cache: a hash of its content.
        url: where it lies.
        num_bytes: its size; None: as the server says.
    """

    name: str
    url: str
    num_bytes: int | None


class ShardCache:
    """Files of remote token stores in a folder. May be used from several threads, processes and jobs at once.

    Args:
        folder: made where it is missing.
        max_bytes: of files in it. Files in use are never removed; where they alone are more, it says so and goes on.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._files, self._locks = folder / "files", folder / "locks"
        self._has_warned = False
        with self._named_errors():
            self._files.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(exist_ok=True)

    def open(self, file: CachedFile, check: Callable[[BinaryIO], None]) -> BinaryIO:
        """The file, fetched where it is not here; it stays as long as it, or a map of it, is open.

        Args:
            check: raises DamagedFileError where a file is not what it should be.

        Raises:
            DamagedFileError: it came wrong twice.
            DataError: it cannot be fetched, or the cache's disk is full or cannot be used.
        """
        with self._named_errors():
            for fetches_left in reversed(range(MAX_FETCHES + 1)):
                try:
                    found = self._find(file, check)
                except DamagedFileError as error:
                    if not fetches_left:
                        raise
                    logger.warning("%s It is fetched again.", error)
                    found = None
                if found is not None:
                    return found
                if fetches_left:
                    self._fetch(file)
        raise DataError(
            f"the cache {self._folder} is so full of files in use that {file.url} is removed before it is read: raise "
            "data.cache_bytes, or give this job a data.cache_dir of its own."
        )

    def fetch(self, file: CachedFile) -> None:
        """Bring a file here that will be needed. Errors as :meth:`open`."""
        with self._named_errors():
            self._fetch(file)

    def _find(self, file: CachedFile, check: Callable[[BinaryIO], None]) -> BinaryIO | None:
        """The file where it is here, open and locked. One that is damaged is removed (DamagedFileError)."""
        path = self._files / file.name
        with ExitStack() as closing:
            try:
                found = closing.enter_context(open(path, "rb"))
            except FileNotFoundError:
                return None
            fcntl.flock(found, fcntl.LOCK_SH)
            if os.fstat(found.fileno()).st_nlink == 0:  # removed between the two lines above
                return None
            _touch(path)
            try:
                check(found)
            except DamagedFileError:
                path.unlink(missing_ok=True)
                raise
            closing.pop_all()
            return found

    def _fetch(self, file: CachedFile) -> None:
        """Bring a file here, unless it is; whoever comes second waits for the first."""
        path = self._files / file.name
        with self._lock(f"{zlib.crc32(file.name.encode()) % 256:02x}"):
            if path.exists():
                _touch(path)
            else:
                num_bytes = remote_size(file.url)
                if file.num_bytes not in (None, num_bytes):
                    raise DataError(
                        f"{file.url} has {num_bytes} bytes and the store's manifest.json describes {file.num_bytes}: "
                        "it was cut or replaced; copy the prepared folder there again."
                    )
                try:
                    self._download(file, path, num_bytes)
                except SaveError as error:
                    if not _is_full(error):
                        raise self._unusable(error) from error
                    if not self._free(num_bytes):
                        raise self._full(file, error) from error
                    self._download(file, path, num_bytes)

    def _download(self, file: CachedFile, path: Path, num_bytes: int) -> None:
        with ExitStack() as until_named, ExitStack() as writing:
            with self._lock(_ROOM):
                self._make_room(num_bytes)
                target = writing.enter_context(atomic_file(path))
                fcntl.flock(target, fcntl.LOCK_EX)
                # The lock belongs to both descriptors, so it holds until the file has its name.
                until_named.callback(os.close, os.dup(target.fileno()))
                target.truncate(num_bytes)  # its room is taken, for whoever counts
            with open_remote(file.url, num_bytes) as source:
                while data := source.read(1 << 20):
                    target.write(data)

    def _make_room(self, num_bytes: int) -> None:
        """Remove what is least recently used and not in use until ``num_bytes`` more fit. The room is locked."""
        kept = self._kept()
        excess = sum(size for _, size, _ in kept) + num_bytes - self._max_bytes
        missing = excess - _remove_unused(kept, excess)
        if missing > 0 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the cache %s needs %d bytes more than data.cache_bytes (%d) for files that are in use by this and "
                "other jobs; it takes them. Raise data.cache_bytes, or lower data.group_shards.",
                *(self._folder, missing, self._max_bytes),
            )

    def _free(self, num_bytes: int) -> bool:
        """Remove at least ``num_bytes`` of what is not in use, if there is as much."""
        with self._lock(_ROOM):
            return _remove_unused(self._kept(), num_bytes) >= num_bytes

    def _kept(self) -> list[tuple[int, int, Path]]:
        """(time of last use, size, path) of the files here, in that order. What killed processes left is removed."""
        kept = []
        for path in self._files.iterdir():
            try:
                if path.name.startswith(".") and _remove_where_unused(path):
                    continue
                status = path.stat()
            except FileNotFoundError:
                continue  # renamed by its owner meanwhile
            kept.append((status.st_mtime_ns, status.st_size, path))
        return sorted(kept)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold one of the cache's own locks."""
        with open(self._locks / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> DataError:
        return DataError(
            f"the cache {self._folder} cannot be used: {error} Set data.cache_dir to a folder that can be written, on "
            "a file system with file locks (flock)."
        )

    def _full(self, file: CachedFile, error: SaveError) -> DataError:
        return DataError(
            f"{file.url} cannot be kept in the cache {self._folder}: {error.__cause__}. Too little there can be "
            "removed: the rest is in use, or not the cache's. Free that disk, or set data.cache_dir to a larger one."
        )


def _remove_unused(kept: list[tuple[int, int, Path]], num_bytes: int) -> int:
    """Remove files that nobody uses, the first ones first, until ``num_bytes`` are free; returns how many became so."""
    freed = 0
    for _, size, path in kept:
        if freed >= num_bytes:
            break
        if _remove_where_unused(path):
            freed += size
    return freed


def _remove_where_unused(path: Path) -> bool:
    """Remove a file unless somebody has it locked; whether it is gone."""
    try:
        with open(path, "r+b") as file:  # NFS gives an exclusive lock only to who may write
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, PermissionError):
        return False
    except FileNotFoundError:
        return True
    return True


def _touch(path: Path) -> None:
    """Note that a file is used now, unless it is another user's or was just removed."""
    with suppress(FileNotFoundError, PermissionError):
        os.utime(path)


def _is_full(error: SaveError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL

"""Reading a checkpoint: every byte is compared with what was written before it is used, and read once for that."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from dsft.checkpoint.manifest import WrittenFile, read_manifest, step_of
from dsft.errors import DamagedCheckpointError
from dsft.fsio import BLOCK_BYTES, HASH_BYTES, block_hash

WINDOW_BYTES = 16 * BLOCK_BYTES
"""Read at a time; a reader holds no more of a file than this."""


class OpenCheckpoint:
    """A checkpoint's manifest, and its files by name.

    Attributes:
        folder: the checkpoint.
        manifest: what it consists of.
        files: the files of all ranks, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest. Raises as :func:`dsft.checkpoint.manifest.read_manifest`."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        if step_of(folder) not in (None, self.manifest.step):
            raise DamagedCheckpointError(
                f"{folder} holds the manifest of another checkpoint, of step {self.manifest.step}."
            )
        self.files = {file.name: file for files in self.manifest.files for file in files}

    def read(self, name: str) -> bytes:
        """A small file, whole and checked.

        Raises:
            DamagedCheckpointError: not there, or not what was written.
        """
        file = self._listed(name)
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        if len(data) != file.num_bytes:
            raise _of_other_length(path, len(data), file.num_bytes)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise DamagedCheckpointError(f"{path} is damaged: its content is not what was written (sha256).")
        return data

    def open_blocks(self, name: str) -> BlockReader:
        """A large file, to read in parts. Raises DamagedCheckpointError as :meth:`read` does."""
        file = self._listed(name)
        path = self.folder / name
        if path.is_symlink() and not path.exists():
            raise self._elsewhere()
        hashes = self.read(file.blocks)
        if len(hashes) != -(-file.num_bytes // BLOCK_BYTES) * HASH_BYTES:
            raise DamagedCheckpointError(f"{self.folder / file.blocks} does not belong to {path}: wrong length.")
        return BlockReader(path, file.num_bytes, hashes)

    def is_here(self, name: str) -> bool:
        """Whether this host has a file, of the right length; a shard may lie on the disks of other hosts."""
        try:
            return (self.folder / name).stat().st_size == self._listed(name).num_bytes
        except OSError:
            return False

    def check_file(self, file: WrittenFile) -> None:
        """Read a whole file to check it. Raises DamagedCheckpointError as :meth:`read` does."""
        if not file.blocks:
            self.read(file.name)
            return
        with self.open_blocks(file.name) as reader:
            for _ in reader.pieces(0, file.num_bytes):
                pass

    def elsewhere(self) -> list[WrittenFile]:
        """Shards that lie on the disks of other hosts and not on this one's."""
        return [file for name, file in self.files.items() if file.hosts and not (self.folder / name).exists()]

    def _elsewhere(self) -> DamagedCheckpointError:
        files = self.elsewhere()
        hosts = ", ".join(sorted({" or ".join(file.hosts) for file in files}))
        return DamagedCheckpointError(
            f"{self.folder}: {len(files)} of its shards are not on this host ({socket.gethostname()}) but on the disks "
            f"of others ({hosts}): {', '.join(file.name for file in files[:3])}{', ...' if len(files) > 3 else ''}. "
            f"Run `dsft ckpt gather {self.folder}` on each of these hosts; it copies what the host has into the folder."
        )

    def _listed(self, name: str) -> WrittenFile:
        if name not in self.files:
            raise DamagedCheckpointError(f"{self.folder} has no {name}: its manifest does not list one.")
        return self.files[name]


class BlockReader:
    """Reads ranges of a file whose blocks are hashed, in a window of bounded size; each block that is read is checked.

    Ranges in rising order read and check every block once.
    """

    def __init__(self, path: Path, num_bytes: int, hashes: bytes) -> None:
        """Open the file. Raises DamagedCheckpointError when it is not there or not as long as it was."""
        self._path = path
        self._num_bytes = num_bytes
        self._hashes = hashes
        self._window = memoryview(bytearray(min(WINDOW_BYTES, num_bytes)))
        self._start = self._end = 0
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by __exit__)
            found_bytes = path.stat().st_size
        except OSError as error:
            raise _unreadable(path, error) from error
        if found_bytes != num_bytes:
            self._file.close()
            raise _of_other_length(path, found_bytes, num_bytes)

    def expect(self, offset: int, num_bytes: int) -> None:
        """Let the kernel begin to fetch the blocks of a range; a hint, and nothing waits for it."""
        start = offset // BLOCK_BYTES * BLOCK_BYTES
        os.posix_fadvise(self._file.fileno(), start, offset + num_bytes - start, os.POSIX_FADV_WILLNEED)

    def pieces(self, offset: int, num_bytes: int) -> Iterator[memoryview]:
        """The bytes of a range, in pieces; use each before asking for the next.

        Raises:
            DamagedCheckpointError: a block is not what was written.
        """
        end = offset + num_bytes
        assert 0 <= offset <= end <= self._num_bytes, (offset, num_bytes, self._num_bytes)
        while offset < end:
            if not self._start <= offset < self._end:
                self._fill(offset, end)
            until = min(end, self._end)
            yield self._window[offset - self._start : until - self._start]
            offset = until

    def _fill(self, offset: int, end: int) -> None:
        """Read and check whole blocks from the one at ``offset`` on, as far as ``end`` or as the window holds."""
        self._start = self._end = offset // BLOCK_BYTES * BLOCK_BYTES
        wanted_bytes = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, self._num_bytes) - self._start
        window = self._window[: min(wanted_bytes, len(self._window))]
        try:
            self._file.seek(self._start)
            found_bytes = 0
            while found_bytes < len(window) and (more := self._file.readinto(window[found_bytes:])):
                found_bytes += more
        except OSError as error:
            raise _unreadable(self._path, error) from error
        for position in range(0, len(window), BLOCK_BYTES):
            number = (self._start + position) // BLOCK_BYTES
            expected = self._hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]
            if found_bytes < len(window) or block_hash(window[position : position + BLOCK_BYTES]) != expected:
                raise DamagedCheckpointError(
                    f"{self._path} is damaged: block {number} (bytes from {number * BLOCK_BYTES:,}) is not what was "
                    "written."
                )
        self._end = self._start + len(window)

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _unreadable(path: Path, error: OSError) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} cannot be read: {error.strerror or error}.")


def _of_other_length(path: Path, found_bytes: int, num_bytes: int) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} is damaged: {found_bytes:,} bytes long, {num_bytes:,} were written.")

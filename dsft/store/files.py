"""Where the files of a token store come from: a folder here, or (``cached_files``) an object store through a cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from dsft.errors import DataError
from dsft.store.layout import index_path, tokens_path
from dsft.store.manifest import Manifest, read_manifest


class ShardFiles(Protocol):
    """The files of one token store."""

    @property
    def place(self) -> str:
        """Its folder or URL."""

    @property
    def manifest(self) -> Manifest:
        """Its root manifest."""

    @property
    def fingerprint(self) -> str:
        """What the store is known by: its content, or (of one that is still made) its raw files and recipe."""

    @property
    def are_verified(self) -> bool:
        """Whether tokens are compared with their hashes when their file is opened, not block by block when read."""

    @property
    def max_mapped_bytes(self) -> int | None:
        """Tokens that one process keeps mapped; None: as many as it likes."""

    def open_index(self, shard: int) -> BinaryIO:
        """A shard's index, for mapping. It stays as long as the file or a map of it is open. Raises DataError."""

    def open_tokens(self, shard: int, block_crc32: npt.NDArray[np.uint32]) -> BinaryIO:
        """A shard's tokens, with the crc32 (uint32[B]) that its index has for each block; as :meth:`open_index`."""

    def will_need(self, shards: Sequence[int]) -> None:
        """Shards that will be read soon, the first ones first. Returns at once."""

    def without_waiting(self) -> AbstractContextManager[None]:
        """Meanwhile, what is not there is an error, also for threads that are waiting for it."""


class LocalFiles:
    """The files of a token store in a folder."""

    are_verified = False
    max_mapped_bytes = None

    def __init__(self, folder: Path) -> None:
        self.place = str(folder.absolute())
        self.manifest = read_manifest(folder)
        self.fingerprint = self.manifest.fingerprint
        self._folder = folder

    def open_index(self, shard: int) -> BinaryIO:
        """See ``ShardFiles``."""
        return open_file(index_path(self._folder, shard))

    def open_tokens(self, shard: int, block_crc32: npt.NDArray[np.uint32]) -> BinaryIO:
        """See ``ShardFiles``; the hashes are compared when a block is first read."""
        return open_file(tokens_path(self._folder, shard))

    def will_need(self, shards: Sequence[int]) -> None:
        """They are here."""

    def without_waiting(self) -> AbstractContextManager[None]:
        """Nothing is waited for."""
        return nullcontext()


def open_file(path: Path) -> BinaryIO:
    """Open a file of a store in a folder. Raises DataError where it is missing."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{name_file(path)} is missing from the token store; run `dsft prepare` again.") from error


def name_file(path: str | Path) -> str:
    """A file of a store for a message: its path and, where its tokens lie elsewhere, that path, too."""
    return f"{path} (a link to {os.readlink(path)})" if os.path.islink(path) else str(path)

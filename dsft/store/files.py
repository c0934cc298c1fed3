"""Where the files of a token store come from: a folder here, or (``cached_files``) an object store through a cache."""

from __future__ import annotations

from collections.abc import Sequence
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


class LocalFiles:
    """The files of a token store in a folder."""

    are_verified = False
    max_mapped_bytes = None

    def __init__(self, folder: Path) -> None:
        self.place = str(folder.absolute())
        self.manifest = read_manifest(folder)
        self._folder = folder

    def open_index(self, shard: int) -> BinaryIO:
        """See ``ShardFiles``."""
        return open_file(index_path(self._folder, shard))

    def open_tokens(self, shard: int, block_crc32: npt.NDArray[np.uint32]) -> BinaryIO:
        """See ``ShardFiles``; the hashes are compared when a block is first read."""
        return open_file(tokens_path(self._folder, shard))

    def will_need(self, shards: Sequence[int]) -> None:
        """They are here."""


def open_file(path: Path) -> BinaryIO:
    """Open a file of a store in a folder. Raises DataError where it is missing."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} is missing from the token store; run `dsft prepare` again.") from error

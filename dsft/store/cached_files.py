"""The files of a token store in an object store, read through a cache on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dsft.errors import DamagedFileError, DataError
from dsft.remote import open_remote, remote_size
from dsft.store.layout import MANIFEST_NAME, index_name, tokens_name
from dsft.store.manifest import fingerprint, parse_manifest
from dsft.store.prefetch import Prefetcher
from dsft.store.reader import map_index_file
from dsft.store.shard_cache import CachedFile, ShardCache
from dsft.store.views import block_damage

INDEX_DOCUMENT_BYTES = 32
"""Of an index: 28 a document with one span, and some for its header and the blocks' hashes."""


class CachedFiles:
    """``ShardFiles`` of a store that was prepared in a folder and then copied to ``url``.

    Args:
        url: of the store, with any scheme of ``data.sources[].path``.
        cache: where its files are kept.
        prefetcher: fetches ahead into the same cache.
        share_bytes: of the cache for this store. A process keeps half of it mapped: other ranks lag behind, and what
            comes next must have room.

    Raises:
        DataError: there is no manifest, it is damaged, or it cannot be reached.
    """

    are_verified = True

    def __init__(self, url: str, cache: ShardCache, prefetcher: Prefetcher, share_bytes: int) -> None:
        self.place = url.rstrip("/")
        path = f"{self.place}/{MANIFEST_NAME}"
        with open_remote(path, remote_size(path)) as file:
            self.manifest = parse_manifest(file.read(), path)
        self.fingerprint = self.manifest.fingerprint
        self.max_mapped_bytes = share_bytes // 2
        self._cache, self._prefetcher, self._share_bytes = cache, prefetcher, share_bytes
        self._shard_bytes = self.manifest.num_tokens * np.dtype(self.manifest.token_dtype).itemsize

    def open_index(self, shard: int) -> BinaryIO:
        """See ``ShardFiles``. Raises DataError also where it cannot be fetched."""
        file = self._index_file(shard)
        return self._cache.open(file, partial(_check_index, file.url, int(self.manifest.index_crc32[shard])))

    def open_tokens(self, shard: int, block_crc32: npt.NDArray[np.uint32]) -> BinaryIO:
        """See ``ShardFiles``; every block is compared with its hash. Raises DataError also as above."""
        file = self._tokens_file(shard)
        return self._cache.open(file, partial(_check_tokens, file, block_crc32))

    def will_need(self, shards: Sequence[int]) -> None:
        """See ``ShardFiles``; of what does not fit into the store's share nothing is fetched ahead."""
        index_bytes = INDEX_DOCUMENT_BYTES * self.manifest.num_documents
        ends = np.cumsum((self._shard_bytes + index_bytes)[list(shards)])
        fitting = shards[: int(np.searchsorted(ends, self._share_bytes, side="right"))]
        indices, tokens = map(self._index_file, fitting), map(self._tokens_file, fitting)
        self._prefetcher.wish(self.place, [*indices, *tokens])

    def without_waiting(self) -> AbstractContextManager[None]:
        """Nothing is waited for but the network."""
        return nullcontext()

    def _index_file(self, shard: int) -> CachedFile:
        return CachedFile(f"{self._content(shard)}.index", f"{self.place}/{index_name(shard)}", None)

    def _tokens_file(self, shard: int) -> CachedFile:
        num_bytes = int(self._shard_bytes[shard])
        return CachedFile(f"{self._content(shard)}.tokens", f"{self.place}/{tokens_name(shard)}", num_bytes)

    def _content(self, shard: int) -> str:
        """A hash of what a shard holds, by what the manifest knows of it: the same in a store that has grown."""
        manifest = self.manifest
        columns = (manifest.num_documents, manifest.num_tokens, manifest.num_targets, manifest.num_bytes)
        counts = [int(column[shard]) for column in (*columns, manifest.index_crc32)]
        return fingerprint([manifest.recipe, manifest.token_dtype, manifest.raw_names[shard], counts])


def _check_index(url: str, crc32: int, file: BinaryIO) -> None:
    try:
        found = map_index_file(file).crc32
        damage = None if found == crc32 else f"its crc32 is {found:08x} and the store's manifest.json has {crc32:08x}"
    except DataError as error:
        damage = str(error)
    if damage is not None:
        raise _damaged(url, damage)
    file.seek(0)


def _check_tokens(expected: CachedFile, block_crc32: npt.NDArray[np.uint32], file: BinaryIO) -> None:
    num_bytes = os.fstat(file.fileno()).st_size
    damage = None if num_bytes == expected.num_bytes else f"it has {num_bytes} bytes instead of {expected.num_bytes}"
    if damage is None and num_bytes:
        data = np.memmap(file, np.uint8, mode="r")
        found = (block_damage(data, block, block_crc32) for block in range(len(block_crc32)))
        damage = next((one for one in found if one is not None), None)
    if damage is not None:
        raise _damaged(expected.url, damage)


def _damaged(url: str, damage: str) -> DamagedFileError:
    return DamagedFileError(
        f"{url}, as it came or as it was kept: {damage}. If that is so again, copy the prepared folder there again."
    )

"""The shards of a store that are mapped now, as addresses for native code; each block of tokens is verified once."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsft.errors import DataError
from dsft.ops.gather_rows import SHARD_VIEW
from dsft.store.layout import BLOCK_BYTES
from dsft.store.types import ShardIndex

MAX_MAPPED_SHARDS = 512
"""Shards kept mapped at a time. A map costs no memory but its document offsets (8 bytes a document)."""

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class MappedShard:
    """A shard that is mapped, and which of its blocks were found as they were written (uint8[B])."""

    path: str
    index: ShardIndex
    tokens: Tokens
    block_is_verified: npt.NDArray[np.uint8]

    def verify_block(self, block: int) -> None:
        """Compare a block of tokens with its crc32.

        Raises:
            DataError: names the token file and the block.
        """
        damage = block_damage(self.tokens.view(np.uint8), block, self.index.block_crc32)
        if damage is not None:
            raise DataError(
                f"{self.path}: {damage}: the file was damaged after it was prepared. Remove it and its .index and run "
                "`dsft prepare` again."
            )


def block_damage(data: npt.NDArray[np.uint8], block: int, block_crc32: npt.NDArray[np.uint32]) -> str | None:
    """How one sees that a block of a token file's bytes is not what was written; None: it is."""
    found = zlib.crc32(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].data)
    expected = int(block_crc32[block])
    if found == expected:
        return None
    return f"block {block} (bytes {block * BLOCK_BYTES} on) has crc32 {found:08x} and was written with {expected:08x}"


@dataclass(frozen=True, slots=True)
class MappedShards:
    """Shards mapped so far. Only ever added to: whoever holds this object may use their addresses."""

    views: npt.NDArray[np.void]
    is_mapped: npt.NDArray[np.bool_]
    shards: dict[int, MappedShard] = field(default_factory=dict)

    def add(self, shard: int, mapped: MappedShard) -> None:
        """Write the view of a shard. Whether it is there is written last: other threads read without a lock."""
        index = mapped.index
        self.shards[shard] = mapped
        arrays = (
            *(mapped.tokens, index.token_offsets, index.span_offsets, index.spans, index.span_weights),
            *(index.block_crc32, mapped.block_is_verified),
        )
        addresses = (array.ctypes.data for array in arrays)
        self.views[shard] = (*addresses, len(index.lengths), mapped.tokens.itemsize)
        self.is_mapped[shard] = True


class ShardViews:
    """Maps shards when they are first asked for; safe to use from several threads.

    Args:
        num_shards: of the store.
        map_shard: maps one of them.
        max_bytes: of tokens that stay mapped when other shards are asked for; None: any.
    """

    def __init__(self, num_shards: int, map_shard: Callable[[int], MappedShard], max_bytes: int | None = None) -> None:
        self._num_shards = num_shards
        self._map_shard = map_shard
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._mapped = self._none()

    def addresses(self, shards: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.uint64], MappedShards]:
        """Address (uint64[S]) of the ``SHARD_VIEW`` of each of ``shards``, and what must live as long as they are used.

        Raises:
            DataError: a shard that cannot be mapped.
        """
        mapped = self._mapped
        if not mapped.is_mapped[shards].all():
            mapped = self._with(np.unique(shards).tolist())
        offsets = shards.astype(np.uint64) * np.uint64(SHARD_VIEW.itemsize)
        return offsets + np.uint64(mapped.views.ctypes.data), mapped

    def shard(self, shard: int) -> MappedShard:
        """A shard, mapped. Raises DataError where it cannot be."""
        return self._mapped.shards.get(shard) or self._with([shard]).shards[shard]

    def verify_document(self, shard: int, document: int) -> None:
        """Compare the blocks that hold a document with their crc32, each once.

        Raises:
            DataError: names the token file and the first block that differs.
        """
        mapped = self.shard(shard)
        begin, end = (mapped.index.token_offsets[document : document + 2] * mapped.tokens.itemsize).tolist()
        for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if not mapped.block_is_verified[block]:
                mapped.verify_block(block)
                mapped.block_is_verified[block] = 1

    def _with(self, shards: list[int]) -> MappedShards:
        """The mapped shards with these among them. Where they would be too many, all others are let go."""
        with self._lock:
            missing = [shard for shard in shards if shard not in self._mapped.shards]
            if missing and self._is_full(len(missing)):
                self._mapped, missing = self._none(), shards
            for shard in missing:
                self._mapped.add(shard, self._map_shard(shard))
            return self._mapped

    def _is_full(self, num_more: int) -> bool:
        mapped = self._mapped.shards
        if len(mapped) + num_more > MAX_MAPPED_SHARDS:
            return True
        return self._max_bytes is not None and sum(one.tokens.nbytes for one in mapped.values()) >= self._max_bytes

    def _none(self) -> MappedShards:
        return MappedShards(np.zeros(self._num_shards, SHARD_VIEW), np.zeros(self._num_shards, np.bool_))

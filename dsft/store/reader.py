"""Reads a token store through memory maps; nothing is loaded that is not asked for."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dsft.constants import STORE_VERSION
from dsft.errors import DataError
from dsft.store.files import LocalFiles, ShardFiles, name_file, open_file
from dsft.store.layout import METADATA_KEY
from dsft.store.manifest import UNKNOWN, Manifest
from dsft.store.types import ShardIndex
from dsft.store.views import MAX_MAPPED_SHARDS, MappedShard, ShardViews

MAX_BOUNDED_INDICES = 64
"""Indices kept open, beside those of mapped shards, where the files' place is bounded: an open file takes its room."""

_NUMPY_TYPES = {"I32": np.int32, "I64": np.int64, "U32": np.uint32, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class IndexFile:
    """An index file as it is on the disk.

    Attributes:
        metadata: version, raw name and identity, token dtype, counts.
        arrays: the index's arrays by name (views of a memory map).
        crc32: of the arrays' bytes.
    """

    metadata: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]
    crc32: int


class SourceStore:
    """A prepared source. May be used from several threads.

    Args:
        files: its folder, or where else its files come from.

    Attributes:
        files: where its files come from.
        manifest: its root manifest.
        fingerprint: of its files (``ShardFiles.fingerprint``).
        views: its mapped shards, for native code.

    Raises:
        DataError: no manifest, another version, or (from ``index`` and ``tokens``) a file that is missing or is not the
            one the manifest describes; names the file.
    """

    def __init__(self, files: Path | ShardFiles) -> None:
        self.files: ShardFiles = files if not isinstance(files, Path) else LocalFiles(files)
        self.manifest: Manifest = self.files.manifest
        self.fingerprint: str = self.files.fingerprint
        is_bounded = self.files.max_mapped_bytes is not None
        self._index = lru_cache(maxsize=MAX_BOUNDED_INDICES if is_bounded else MAX_MAPPED_SHARDS)(self._map_index)
        self.views = ShardViews(self.num_shards, self.map_shard, self.files.max_mapped_bytes)

    @property
    def place(self) -> str:
        """Its folder or URL."""
        return self.files.place

    @property
    def name(self) -> str:
        """The source's name in the YAML."""
        return self.manifest.name

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.manifest.raw_names)

    def index(self, shard: int) -> ShardIndex:
        """The document index of a shard."""
        return self._index(shard)

    def tokens(self, shard: int) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        """All tokens of a shard: a read-only memory map of uint16 or uint32."""
        return self.views.shard(shard).tokens

    def map_shard(self, shard: int) -> MappedShard:
        """A shard, none of whose blocks ``views`` has verified yet; ``views`` keeps those in use."""
        index = self.index(shard)
        with self.files.open_tokens(shard, index.block_crc32) as file:
            tokens = _map_tokens(file, self.manifest.token_dtype, int(index.token_offsets[-1]))
            is_verified = np.full(len(index.block_crc32), self.files.are_verified, dtype=np.uint8)
            return MappedShard(name_file(file.name), index, tokens, is_verified)

    def _map_index(self, shard: int) -> ShardIndex:
        with self.files.open_index(shard) as file:
            return _checked_index(file, int(self.manifest.index_crc32[shard]))


def verify_shard(store: SourceStore, shard: int) -> None:
    """Read a shard's tokens and compare every block with its crc32.

    Raises:
        DataError: names the token file and the first block that differs.
    """
    mapped = store.map_shard(shard)
    for block in range(len(mapped.index.block_crc32)):
        mapped.verify_block(block)


def read_index_metadata(path: Path) -> dict[str, Any]:
    """The metadata of one index file, without its arrays.

    Raises:
        DataError: missing, damaged or of another version; names the file.
    """
    with open_file(path) as file:
        return _read_header(file)[1]


def read_index_file(path: Path) -> IndexFile:
    """Map one index file and check its version.

    Raises:
        DataError: missing, cut short or of another version; names the file.
    """
    with open_file(path) as file:
        return map_index_file(file)


def map_index_file(file: BinaryIO) -> IndexFile:
    """As :func:`read_index_file`, of a file that is open; the map keeps it open (and locked)."""
    header, metadata, start = _read_header(file)
    try:
        body = np.memmap(file, np.uint8, mode="r")[start:]
        arrays = {name: _array(body, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file.name} is damaged ({error}); remove it and run `dsft prepare` again.") from error
    return IndexFile(metadata, arrays, zlib.crc32(body.tobytes()))


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The safetensors header without metadata, the metadata, and where the arrays begin."""
    try:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is not one of safetensors")
        header = json.loads(file.read(header_bytes))
        metadata = json.loads(header.pop("__metadata__")[METADATA_KEY])
        version = metadata["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file.name} is damaged ({error}); remove it and run `dsft prepare` again.") from error
    if version != STORE_VERSION:
        raise DataError(
            f"{file.name} is of store version {version} and this dsft reads version {STORE_VERSION}; remove the folder "
            "and run `dsft prepare` again."
        )
    return header, metadata, 8 + header_bytes


def _array(body: npt.NDArray[np.uint8], entry: dict[str, Any]) -> npt.NDArray[Any]:
    start, end = entry["data_offsets"]
    if end > len(body):
        raise ValueError(f"it ends {end - len(body)} bytes early")
    return np.frombuffer(body, np.uint8)[start:end].view(_NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])


def _checked_index(file: BinaryIO, crc32: int) -> ShardIndex:
    found = map_index_file(file)
    if crc32 not in (found.crc32, UNKNOWN):
        raise DataError(
            f"{file.name} is not the index that the store's manifest.json describes (crc32 {found.crc32:08x}, expected "
            f"{crc32:08x}): it was damaged or prepared anew; run `dsft prepare` again."
        )
    token_offsets = np.zeros(len(found.arrays["lengths"]) + 1, np.int64)
    np.cumsum(found.arrays["lengths"], out=token_offsets[1:], dtype=np.int64)
    # Native code reads some of these through their addresses, so they must lie as their types demand.
    arrays = {name: np.require(array, requirements=["A", "C"]) for name, array in found.arrays.items()}
    return ShardIndex(
        lengths=arrays["lengths"],
        num_bytes=arrays["num_bytes"],
        span_offsets=arrays["span_offsets"],
        spans=arrays["spans"],
        span_weights=arrays["span_weights"],
        block_crc32=arrays["block_crc32"],
        token_offsets=token_offsets,
    )


def _map_tokens(file: BinaryIO, token_dtype: str, num_tokens: int) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
    dtype = np.dtype(token_dtype).newbyteorder("<")
    expected_bytes = num_tokens * dtype.itemsize
    found_bytes = os.fstat(file.fileno()).st_size
    if found_bytes != expected_bytes:
        raise DataError(
            f"{name_file(file.name)} has {found_bytes} bytes and its index describes {expected_bytes}: it was cut "
            f"or replaced; remove it and its .index and run `dsft prepare` again."
        )
    if expected_bytes == 0:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")

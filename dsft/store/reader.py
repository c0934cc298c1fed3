"""Reads a token store through memory maps; nothing is loaded that is not asked for."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsft.constants import STORE_VERSION
from dsft.errors import DataError
from dsft.store.layout import METADATA_KEY, index_path, tokens_path
from dsft.store.manifest import Manifest, read_manifest
from dsft.store.types import ShardIndex
from dsft.store.views import MAX_MAPPED_SHARDS, MappedShard, ShardViews

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

    Attributes:
        folder: where it is.
        manifest: its root manifest.
        fingerprint: hash of its content (``Manifest.fingerprint``).
        views: its mapped shards, for native code.

    Raises:
        DataError: no manifest, another version, or (from ``index`` and ``tokens``) a file that is missing or is not the
            one the manifest describes; names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.fingerprint: str = self.manifest.fingerprint
        self._index = lru_cache(maxsize=MAX_MAPPED_SHARDS)(partial(_checked_index, folder, self.manifest))
        self._tokens = lru_cache(maxsize=MAX_MAPPED_SHARDS)(partial(_checked_tokens, folder, self.manifest))
        self.views = ShardViews(self.num_shards, self.map_shard)

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
        return self._tokens(shard)

    def map_shard(self, shard: int) -> MappedShard:
        """A shard of which no block is verified yet; ``views`` keeps those in use."""
        index = self.index(shard)
        is_verified = np.zeros(len(index.block_crc32), dtype=np.uint8)
        return MappedShard(tokens_path(self.folder, shard), index, self.tokens(shard), is_verified)


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
    return _read_header(path)[1]


def read_index_file(path: Path) -> IndexFile:
    """Map one index file and check its version.

    Raises:
        DataError: missing, cut short or of another version; names the file.
    """
    header, metadata, start = _read_header(path)
    try:
        body = np.memmap(path, np.uint8, mode="r")[start:]
        arrays = {name: _array(body, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run `dsft prepare` again.") from error
    return IndexFile(metadata, arrays, zlib.crc32(body.tobytes()))


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The safetensors header without metadata, the metadata, and where the arrays begin."""
    try:
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > path.stat().st_size:
                raise ValueError("its header is not one of safetensors")
            header = json.loads(file.read(header_bytes))
        metadata = json.loads(header.pop("__metadata__")[METADATA_KEY])
        version = metadata["version"]
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing from the token store; run `dsft prepare` again.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run `dsft prepare` again.") from error
    if version != STORE_VERSION:
        raise DataError(
            f"{path} is of store version {version} and this dsft reads version {STORE_VERSION}; remove the folder and "
            "run `dsft prepare` again."
        )
    return header, metadata, 8 + header_bytes


def _array(body: npt.NDArray[np.uint8], entry: dict[str, Any]) -> npt.NDArray[Any]:
    start, end = entry["data_offsets"]
    if end > len(body):
        raise ValueError(f"it ends {end - len(body)} bytes early")
    return np.frombuffer(body, np.uint8)[start:end].view(_NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])


def _checked_index(folder: Path, manifest: Manifest, shard: int) -> ShardIndex:
    path = index_path(folder, shard)
    file = read_index_file(path)
    if file.crc32 != manifest.index_crc32[shard]:
        raise DataError(
            f"{path} is not the index that {folder.name}/manifest.json describes (crc32 {file.crc32:08x}, expected "
            f"{int(manifest.index_crc32[shard]):08x}): it was damaged or prepared anew; run `dsft prepare` again."
        )
    token_offsets = np.zeros(len(file.arrays["lengths"]) + 1, np.int64)
    np.cumsum(file.arrays["lengths"], out=token_offsets[1:], dtype=np.int64)
    # Native code reads some of these through their addresses, so they must lie as their types demand.
    arrays = {name: np.require(array, requirements=["A", "C"]) for name, array in file.arrays.items()}
    return ShardIndex(
        lengths=arrays["lengths"],
        num_bytes=arrays["num_bytes"],
        span_offsets=arrays["span_offsets"],
        spans=arrays["spans"],
        span_weights=arrays["span_weights"],
        block_crc32=arrays["block_crc32"],
        token_offsets=token_offsets,
    )


def _checked_tokens(folder: Path, manifest: Manifest, shard: int) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
    path = tokens_path(folder, shard)
    dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
    expected_bytes = int(manifest.num_tokens[shard]) * dtype.itemsize
    try:
        found_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} is missing from the token store; run `dsft prepare` again.") from error
    if found_bytes != expected_bytes:
        raise DataError(
            f"{path} has {found_bytes} bytes and its index describes {expected_bytes}: it was cut or replaced; "
            f"remove it and its .index and run `dsft prepare` again."
        )
    if expected_bytes == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")

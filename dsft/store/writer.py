"""Writes one shard of a token store: tokens as they come, the index last and by rename."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsft.constants import STORE_VERSION
from dsft.fsio import atomic_file, save_error, write_bytes
from dsft.store.layout import BLOCK_BYTES, METADATA_KEY, index_path, tokens_path
from dsft.store.types import Document


class ShardWriter:
    """Writes the documents of one raw shard. Memory: the index only (about 30 bytes a document).

    Publishing is idempotent: the bytes depend on the documents alone, so a shard that another job has published in the
    meantime is left as it is.

    Args:
        folder: the store's folder (made if missing).
        shard: number of the shard, from 0.
        token_dtype: uint16 or uint32 (``dsft.store.layout.token_dtype``).
        raw_name: name of the raw shard, for messages.
        raw_identity: text that changes when the raw shard does; empty where there is none.

    Raises:
        SaveError: the disk is full or the folder cannot be written; nothing half-written is left.
    """

    def __init__(
        self,
        folder: Path,
        shard: int,
        token_dtype: npt.DTypeLike,
        raw_name: str,
        raw_identity: str = "",
    ) -> None:
        self._tokens_path = tokens_path(folder, shard)
        self._index_path = index_path(folder, shard)
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        self._most_id = int(np.iinfo(self._dtype).max)
        self._raw = {"raw_name": raw_name, "raw_identity": raw_identity}
        self._lengths, self._num_bytes = array("i"), array("i")
        self._span_counts, self._spans, self._span_weights = array("i"), array("i"), array("f")
        self._num_targets = 0
        self._block_crc32 = array("I")
        self._block = bytearray()
        self._stack = ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise save_error(folder, error) from error
        self._file = self._stack.enter_context(atomic_file(self._tokens_path))

    def add(self, document: Document) -> None:
        """Append one document. Its ids must fit the token dtype and its spans must be ascending and disjoint."""
        num_tokens = len(document.ids)
        assert num_tokens >= 1
        assert int(document.ids.view(np.uint32).max()) <= self._most_id  # a negative one is above all
        assert document.spans.shape == (len(document.span_weights), 2)
        edges: list[int] = document.spans.ravel().tolist()
        assert _are_disjoint(edges, num_tokens)
        self._write(document.ids.astype(self._dtype).tobytes())
        self._lengths.append(num_tokens)
        self._num_bytes.append(document.num_bytes)
        self._span_counts.append(len(document.spans))
        self._spans.extend(edges)
        self._span_weights.extend(document.span_weights.tolist())
        self._num_targets += document.num_targets

    def close(self, counts: Mapping[str, int] | None = None) -> None:
        """Publish the shard: tokens first, then the index, each by rename.

        Args:
            counts: what was dropped and why, kept in the index and summed in the manifest.
        """
        if self._block:
            self._block_crc32.append(zlib.crc32(self._block))
        index = self._index_bytes(counts or {})
        try:
            if self._is_published(index):
                self.abort()
                return
            self._index_path.unlink(missing_ok=True)  # an old index must never stand beside new tokens
        except OSError as error:
            self.abort()
            raise save_error(self._index_path, error) from error
        self._stack.close()
        write_bytes(self._index_path, index)

    def abort(self) -> None:
        """Remove what was written so far."""
        try:
            with self._stack:
                raise _Abandoned
        except _Abandoned:
            pass

    def _is_published(self, index: bytes) -> bool:
        if not (self._index_path.exists() and self._tokens_path.exists()):
            return False
        num_bytes = sum(self._lengths) * self._dtype.itemsize
        return self._tokens_path.stat().st_size == num_bytes and self._index_path.read_bytes() == index

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.abort()
            raise save_error(self._tokens_path, error) from error
        self._block += data
        while len(self._block) >= BLOCK_BYTES:
            self._block_crc32.append(zlib.crc32(self._block[:BLOCK_BYTES]))
            del self._block[:BLOCK_BYTES]

    def _index_bytes(self, counts: Mapping[str, int]) -> bytes:
        span_offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(np.array(self._span_counts, np.int64), out=span_offsets[1:])
        arrays: dict[str, npt.NDArray[Any]] = {
            "lengths": np.array(self._lengths, np.int32),
            "num_bytes": np.array(self._num_bytes, np.int32),
            "span_offsets": span_offsets,
            "spans": np.array(self._spans, np.int32).reshape(-1, 2),
            "span_weights": np.array(self._span_weights, np.float32),
            "block_crc32": np.array(self._block_crc32, np.uint32),
        }
        return index_bytes(arrays, self._dtype, self._num_targets, {**self._raw, "counts": dict(counts)})


def _are_disjoint(edges: list[int], num_tokens: int) -> bool:
    """Spans that are not empty, ascend, and lie in their document. For the few of one, numpy's calls cost more."""
    before, ends = [0, *edges[1::2]], [*edges[::2], num_tokens]
    return all(a <= b for a, b in zip(before, ends, strict=True)) and all(
        start < end for start, end in zip(edges[::2], edges[1::2], strict=True)
    )


def index_bytes(
    arrays: Mapping[str, npt.NDArray[Any]], dtype: np.dtype[Any], num_targets: int, metadata: Mapping[str, Any]
) -> bytes:
    """The content of an index file.

    Args:
        arrays: those of ``ShardIndex`` but token_offsets, by name.
        dtype: of the tokens.
        num_targets: supervised tokens that are predicted.
        metadata: raw_name, raw_identity, counts, and whatever else is worth keeping.
    """
    from safetensors.numpy import save

    described = {
        "version": STORE_VERSION,
        **metadata,
        "token_dtype": dtype.name,
        "num_documents": len(arrays["lengths"]),
        "num_tokens": int(arrays["lengths"].sum(dtype=np.int64)),
        "num_targets": num_targets,
        "num_bytes": int(arrays["num_bytes"].sum(dtype=np.int64)),
    }
    return save(dict(arrays), metadata={METADATA_KEY: json.dumps(described, sort_keys=True)})


class _Abandoned(Exception):  # noqa: N818  (never leaves this file: it makes atomic_file drop its temporary file)
    pass

"""Makes a token file of another program a shard of a store: an index is written, and a link to the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsft.fsio import save_error, write_bytes
from dsft.store.layout import index_path, tokens_path
from dsft.store.writer import index_bytes


def publish_in_place(
    folder: Path,
    shard: int,
    tokens: Path,
    dtype: np.dtype[Any],
    lengths: npt.NDArray[np.int32],
    block_crc32: npt.NDArray[np.uint32],
    metadata: Mapping[str, Any],
) -> None:
    """Publish a shard whose documents are learned whole, as ``ShardWriter`` does: its tokens first, then the index.

    Args:
        folder: the store's folder; it exists.
        shard: number of the shard, from 0.
        tokens: the file, documents one after the other from byte 0 on.
        dtype: uint16 or uint32, little-endian.
        lengths: int32[N], tokens of each document, >= 1; together the whole file.
        block_crc32: uint32[B], of each ``BLOCK_BYTES`` of the file.
        metadata: as of ``index_bytes``. The length of the text is not known: num_bytes is 0.

    Raises:
        SaveError: the folder cannot be written.
    """
    num_documents = len(lengths)
    arrays: dict[str, npt.NDArray[Any]] = {
        "lengths": lengths,
        "num_bytes": np.zeros(num_documents, np.int32),
        "span_offsets": np.arange(num_documents + 1, dtype=np.int64),
        "spans": np.stack([np.zeros(num_documents, np.int32), lengths], axis=1),
        "span_weights": np.ones(num_documents, np.float32),
        "block_crc32": block_crc32,
    }
    num_targets = int(lengths.sum(dtype=np.int64)) - num_documents  # a document's first token is not predicted
    link = tokens_path(folder, shard)
    temporary = folder / f".{link.name}.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(tokens.absolute())
        index_path(folder, shard).unlink(missing_ok=True)  # an old index must never stand beside new tokens
        temporary.replace(link)
    except OSError as error:
        raise save_error(link, error) from error
    write_bytes(index_path(folder, shard), index_bytes(arrays, dtype, num_targets, metadata))

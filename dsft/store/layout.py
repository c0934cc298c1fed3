"""Names, sizes and types of a token store's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 65_536
"""Bytes of tokens under one crc32."""

METADATA_KEY = "dsft"
"""The one key of an index's safetensors metadata; its value is JSON with sorted keys, so that the bytes of an index do
not depend on the order of a hash map."""

MANIFEST_NAME = "manifest.json"


def tokens_name(shard: int) -> str:
    """What the file of a shard's tokens is called."""
    return f"shard-{shard:06d}.tokens"


def index_name(shard: int) -> str:
    """What the file of a shard's index is called."""
    return f"shard-{shard:06d}.index"


def tokens_path(folder: Path, shard: int) -> Path:
    """Where a shard's tokens are."""
    return folder / tokens_name(shard)


def index_path(folder: Path, shard: int) -> Path:
    """Where a shard's index is; the shard is whole when this exists."""
    return folder / index_name(shard)


def token_dtype(vocab_tokens: int) -> np.dtype[np.unsignedinteger[npt.NBitBase]]:
    """Little-endian uint16 for a vocabulary of less than 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_tokens < 65_536 else "<u4")

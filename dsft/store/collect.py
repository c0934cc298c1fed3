"""From published shards to the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsft.errors import DataError
from dsft.store.layout import index_path, token_dtype
from dsft.store.manifest import Manifest
from dsft.store.reader import IndexFile, read_index_file


def collect_manifest(
    folder: Path, *, name: str, recipe: Mapping[str, Any], listing: str, vocab_tokens: int, num_shards: int
) -> Manifest:
    """Read every index of a store whose shards are all published. Raises DataError as ``read_index_file`` does, and
    where shards that were tokenised elsewhere hold tokens of different types."""
    raw_names: list[str] = []
    columns: dict[str, list[int]] = {key: [] for key in ("num_documents", "num_tokens", "num_targets", "num_bytes")}
    crc32: list[int] = []
    shard_of_dtype: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for shard in range(num_shards):
        file: IndexFile = read_index_file(index_path(folder, shard))
        raw_names.append(file.metadata["raw_name"])
        for key, column in columns.items():
            column.append(file.metadata[key])
        crc32.append(file.crc32)
        if file.metadata["num_tokens"]:
            shard_of_dtype.setdefault(file.metadata["token_dtype"], shard)
        counts.update(file.metadata["counts"])
    if len(shard_of_dtype) > 1:
        places = " and ".join(f"{raw_names[shard]} of {dtype}" for dtype, shard in shard_of_dtype.items())
        raise DataError(f"data source {name!r}: its files hold tokens of two types, {places}. Make them two sources.")
    return Manifest(
        name=name,
        recipe=recipe,
        listing=listing,
        token_dtype=next(iter(shard_of_dtype), token_dtype(vocab_tokens).name),
        vocab_tokens=vocab_tokens,
        raw_names=tuple(raw_names),
        index_crc32=np.array(crc32, np.int64),
        counts=dict(sorted(counts.items())),
        **{key: np.array(column, np.int64) for key, column in columns.items()},
    )

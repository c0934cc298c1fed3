"""From published shards to the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsft.store.layout import index_path, token_dtype
from dsft.store.manifest import Manifest
from dsft.store.reader import IndexFile, read_index_file


def collect_manifest(
    folder: Path, *, name: str, recipe: Mapping[str, Any], listing: str, vocab_tokens: int, num_shards: int
) -> Manifest:
    """Read every index of a store whose shards are all published. Raises DataError as ``read_index_file`` does."""
    raw_names: list[str] = []
    columns: dict[str, list[int]] = {key: [] for key in ("num_documents", "num_tokens", "num_targets", "num_bytes")}
    crc32: list[int] = []
    counts: Counter[str] = Counter()
    for shard in range(num_shards):
        file: IndexFile = read_index_file(index_path(folder, shard))
        raw_names.append(file.metadata["raw_name"])
        for key, column in columns.items():
            column.append(file.metadata[key])
        crc32.append(file.crc32)
        counts.update(file.metadata["counts"])
    return Manifest(
        name=name,
        recipe=recipe,
        listing=listing,
        token_dtype=token_dtype(vocab_tokens).name,
        vocab_tokens=vocab_tokens,
        raw_names=tuple(raw_names),
        index_crc32=np.array(crc32, np.int64),
        counts=dict(sorted(counts.items())),
        **{key: np.array(column, np.int64) for key, column in columns.items()},
    )

"""Token stores for tests, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsft.store.collect import collect_manifest
from dsft.store.layout import token_dtype
from dsft.store.manifest import write_manifest
from dsft.store.reader import SourceStore
from dsft.store.types import Document
from dsft.store.writer import ShardWriter


def text_document(ids: Sequence[int]) -> Document:
    """A document that is supervised whole, as raw text is."""
    return Document(
        np.array(ids, np.int32), np.array([[0, len(ids)]], np.int32), np.ones(1, np.float32), num_bytes=4 * len(ids)
    )


def write_store(
    folder: Path,
    documents: Sequence[Document],
    *,
    num_shards: int = 1,
    name: str = "source",
    vocab_tokens: int = 1000,
) -> SourceStore:
    """Write documents to a store, cut in order into ``num_shards`` shards of nearly equal counts, and open it."""
    borders = [round(position * len(documents) / num_shards) for position in range(num_shards + 1)]
    for shard in range(num_shards):
        writer = ShardWriter(folder, shard, token_dtype(vocab_tokens), f"raw-{shard}")
        for document in documents[borders[shard] : borders[shard + 1]]:
            writer.add(document)
        writer.close()
    manifest = collect_manifest(
        folder, name=name, recipe={"test": True}, listing="", vocab_tokens=vocab_tokens, num_shards=num_shards
    )
    write_manifest(folder, manifest)
    return SourceStore(folder)


def grow_store(folder: Path, documents: Sequence[Document]) -> SourceStore:
    """Add a shard to a store of :func:`write_store`, and open it."""
    old = SourceStore(folder).manifest
    num_shards = len(old.raw_names)
    writer = ShardWriter(folder, num_shards, old.token_dtype, f"raw-{num_shards}")
    for document in documents:
        writer.add(document)
    writer.close()
    manifest = collect_manifest(
        folder,
        name=old.name,
        recipe=old.recipe,
        listing="",
        vocab_tokens=old.vocab_tokens,
        num_shards=num_shards + 1,
    )
    write_manifest(folder, manifest)
    return SourceStore(folder)


def two_stores(folder: Path, num_shards: int) -> tuple[SourceStore, SourceStore]:
    """Stores ``a`` (short documents) and ``b`` (longer ones) of 80 documents each."""
    rng = np.random.default_rng(1)
    a, b = (
        write_store(
            folder / name,
            [text_document(rng.integers(0, 900, n)) for n in rng.integers(1, longest, 80)],
            num_shards=num_shards,
            name=name,
        )
        for name, longest in (("a", 60), ("b", 200))
    )
    return a, b

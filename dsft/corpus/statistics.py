"""What a prepared source holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsft.store.reader import SourceStore

PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """Numbers of one source.

    Attributes:
        name: of the source.
        shards, documents, tokens: counts.
        supervised_tokens: tokens that are predicted and learned.
        supervised_share: these over all tokens.
        bytes_per_token: UTF-8 bytes of learned text over learned tokens; 0: not known (format tokens).
        length_percentiles: percentile -> tokens a document.
        longest: tokens of the longest document.
        left_out: records that became no document, by reason.
    """

    name: str
    shards: int
    documents: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    bytes_per_token: float
    length_percentiles: dict[str, int]
    longest: int
    left_out: dict[str, int]


def source_statistics(store: SourceStore) -> SourceStatistics:
    """Measure a store. Reads every document's length, and no token. Memory: the longest document times 8 bytes."""
    manifest = store.manifest
    tokens, targets = int(manifest.num_tokens.sum()), int(manifest.num_targets.sum())
    histogram = length_histogram(store)
    return SourceStatistics(
        name=store.name,
        shards=store.num_shards,
        documents=int(manifest.num_documents.sum()),
        tokens=tokens,
        supervised_tokens=targets,
        supervised_share=targets / tokens,
        bytes_per_token=int(manifest.num_bytes.sum()) / targets,
        length_percentiles={str(p): _percentile(histogram, p) for p in PERCENTILES},
        longest=len(histogram) - 1,
        left_out=dict(manifest.counts),
    )


def length_histogram(store: SourceStore) -> npt.NDArray[np.int64]:
    """int64[longest + 1]: how many documents have each length in tokens."""
    histogram = np.zeros(1, np.int64)
    for shard in range(store.num_shards):
        counts = np.bincount(store.index(shard).lengths).astype(np.int64)
        if len(counts) > len(histogram):
            counts, histogram = histogram, counts
        histogram[: len(counts)] += counts
    return histogram


def _percentile(histogram: npt.NDArray[np.int64], percentile: int) -> int:
    """The smallest length that at least ``percentile`` percent of the documents do not exceed."""
    cumulative = np.cumsum(histogram)
    return int(np.searchsorted(cumulative, cumulative[-1] * percentile / 100))

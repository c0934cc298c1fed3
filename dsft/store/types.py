"""Values at the seams of the token store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Document:
    """One record after tokenisation.

    Attributes:
        ids: int32[n], n >= 1.
        spans: int32[k, 2], half-open intervals of supervised *target* token indices, ascending, disjoint.
        span_weights: float32[k], loss factor of each span (> 0).
        num_bytes: length of the supervised text in UTF-8 bytes (for bits per byte).
    """

    ids: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    span_weights: npt.NDArray[np.float32]
    num_bytes: int

    @property
    def num_targets(self) -> int:
        """Supervised tokens that are predicted: token 0 never is."""
        return sum(max(end - max(start, 1), 0) for start, end in self.spans.tolist())


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The document index of one shard (arrays may be memory maps).

    Attributes:
        lengths: int32[N] tokens per document.
        num_bytes: int32[N].
        span_offsets: int64[N + 1]; the spans of document d are ``spans[span_offsets[d]:span_offsets[d + 1]]``.
        spans: int32[K, 2], token indices inside their document.
        span_weights: float32[K].
        block_crc32: uint32[B], one per ``BLOCK_BYTES`` of the token file.
        token_offsets: int64[N + 1], start of each document in the token file (cumulative lengths).
    """

    lengths: npt.NDArray[np.int32]
    num_bytes: npt.NDArray[np.int32]
    span_offsets: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int32]
    span_weights: npt.NDArray[np.float32]
    block_crc32: npt.NDArray[np.uint32]
    token_offsets: npt.NDArray[np.int64]

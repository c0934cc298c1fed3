"""Labels of masked language modelling: a row predicts its own token, where everything else predicts the next one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsft.sampling.types import Pieces
from dsft.store.reader import SourceStore


def unshift(rows: torch.Tensor, targets: torch.Tensor, pieces: Pieces, stores: Sequence[SourceStore]) -> None:
    """Move each row to the token that it was to predict, and let it predict what the store holds there; in place.

    Args:
        rows: int32[n], ascending, each the position before a chosen token. No chosen token is the first of a piece.
        targets: int32[n], what the model is given there, which may be the mask.
        pieces: of the row, in order.
        stores: one a source.
    """
    rows += 1
    positions = rows.numpy().astype(np.int64)
    ends = np.cumsum(pieces.length, dtype=np.int64)
    piece_of_row = np.searchsorted(ends, positions, side="right")
    found = targets.numpy()
    borders = np.searchsorted(piece_of_row, np.arange(len(ends) + 1))
    for piece in np.unique(piece_of_row).tolist():
        first, last = borders[piece], borders[piece + 1]
        store, shard = stores[int(pieces.source[piece])], int(pieces.shard[piece])
        begin = int(store.index(shard).token_offsets[int(pieces.document[piece])]) + int(pieces.start[piece])
        inside = positions[first:last] - (ends[piece] - int(pieces.length[piece]))
        found[first:last] = store.tokens(shard)[begin + inside]

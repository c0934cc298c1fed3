"""From packs to tensors: read the pieces' tokens and supervised spans, and lay them side by side in one row.

Labels are shifted once, per document, before it is cut: row i predicts token i + 1. So the last row of a piece predicts
the first token of the next piece (its lookahead token), and only the last row of a document predicts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dsft.batch.hashing import HASH_KEY, hash_row
from dsft.batch.types import PackedBatch
from dsft.batch.unshift import unshift
from dsft.errors import DataError
from dsft.ops import backend
from dsft.ops.buffers import BufferPool
from dsft.ops.gather_rows import GatheredRow, document_view, gather_rows
from dsft.ops.loss_mask import expand_loss_mask
from dsft.ops.pack import pack_sequences
from dsft.ops.reference import LossReduction
from dsft.sampling.mlm import MlmOrder
from dsft.sampling.objectives import ObjectiveOrder
from dsft.sampling.types import Pieces
from dsft.store.reader import SourceStore

FILLER_TOKENS = 8
"""Length of the document a rank runs when it has no pack left: short, and long enough for any attention kernel."""


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """How packs become tensors.

    Attributes:
        stores: one per source, in the configuration's order.
        loss_weights: per source, factor of its rows in the loss; 0: it has no rows.
        loss_reduction: token: every row counts by its weight; document: the rows of a document are divided by their
            number in the whole document, also when it was split; message: by their number in their message.
        pack_tokens: tokens of a pack's place in the row; a row of k packs has ``k * pack_tokens``.
        pad_id: token of padding and fillers.
        truncate_overlong: a document ends after ``pack_tokens`` tokens (data.overlong: truncate).
        objectives: per source, how an epoch changes its documents; None: not. Empty: no source's are.
    """

    stores: tuple[SourceStore, ...]
    loss_weights: tuple[float, ...]
    loss_reduction: LossReduction
    pack_tokens: int
    pad_id: int
    truncate_overlong: bool = False
    objectives: tuple[ObjectiveOrder | None, ...] = ()


@dataclass(frozen=True, slots=True)
class _Contents:
    """What the stores hold for some pieces (S of them).

    Attributes:
        tokens: int32, the pieces one after the other, each with its lookahead token if its document goes on.
        offsets: int64[S + 1], borders of the pieces in ``tokens``.
        has_lookahead: bool[S].
        document_tokens: int64[S], length of the whole document.
        spans: int32[K, 2], supervised targets of the *whole* document, counted from its start.
        span_weights: float32[K].
        span_offsets: int64[S + 1], borders of the pieces in ``spans``.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    has_lookahead: npt.NDArray[np.bool_]
    document_tokens: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int32]
    span_weights: npt.NDArray[np.float32]
    span_offsets: npt.NDArray[np.int64]


def collate(packs: Sequence[Pieces], spec: BatchSpec) -> PackedBatch:
    """Build one micro-batch: a row of ``len(packs) * pack_tokens`` tokens with the pieces of ``packs`` in order.

    Args:
        packs: at least one.

    Raises:
        DataError: a store that cannot be read.
    """
    return collate_rows([packs], spec)[0]


def collate_rows(
    rows: Sequence[Sequence[Pieces]], spec: BatchSpec, buffers: BufferPool | None = None
) -> list[PackedBatch]:
    """Several micro-batches, each as :func:`collate` makes it; natively their tensors share one of ``buffers``.

    Raises:
        DataError: a store that cannot be read.
    """
    assert all(rows), "a rank without packs runs a filler"
    if not rows:
        return []
    pieces = [join_packs(packs) for packs in rows]
    row_tokens = [len(packs) * spec.pack_tokens for packs in rows]
    if backend.current() == "native":
        gathered = _gather(pieces, row_tokens, spec, buffers)
    else:
        gathered = [_gather_reference(*row, spec) for row in zip(pieces, row_tokens, strict=True)]
    if any(isinstance(order, MlmOrder) for order in spec.objectives):
        for row, of_row in zip(gathered, pieces, strict=True):
            unshift(row.rows, row.targets, of_row, spec.stores)
    return [
        PackedBatch(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            cu_seqlens=row.cu_seqlens,
            max_seqlen=row.max_seqlen,
            rows=row.rows,
            targets=row.targets,
            row_weight=row.row_weight,
            pieces=of_row,
            num_tokens=row.num_tokens,
            num_padding_tokens=tokens - row.num_tokens,
            is_filler=False,
            weight_sum=row.weight_sum,
            data_hash=row.data_hash,
        )
        for of_row, tokens, row in zip(pieces, row_tokens, gathered, strict=True)
    ]


def _gather(
    pieces_of_rows: list[Pieces], row_tokens: list[int], spec: BatchSpec, buffers: BufferPool | None
) -> list[GatheredRow]:
    """As :func:`_gather_reference` for each row, in one native call that reads the mapped shards where they are."""
    pieces = join_packs(pieces_of_rows)
    views, places, alive = _views(pieces, spec)
    try:
        rows = gather_rows(
            views,
            places,
            (pieces.source, pieces.shard, pieces.document, pieces.start, pieces.length),
            [len(row.length) for row in pieces_of_rows],
            row_tokens,
            loss_weights=np.array(spec.loss_weights, dtype=np.float64),
            reduction=spec.loss_reduction,
            most_document_tokens=spec.pack_tokens if spec.truncate_overlong else 2**62,
            pack_tokens=spec.pack_tokens,
            pad_id=spec.pad_id,
            hash_key=HASH_KEY,
            buffers=buffers,
        )
    except DataError:
        for source, shard, document in zip(pieces.source, pieces.shard, pieces.document, strict=True):
            spec.stores[source].views.verify_document(int(shard), int(document))  # names the file and the block
        raise
    del alive  # the addresses were used until here
    return rows


def _views(pieces: Pieces, spec: BatchSpec) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], list[object]]:
    """Address of the view each piece is read from, its document's number there, and what owns the memory."""
    if len(spec.stores) == 1 and not any(spec.objectives):
        views, mapped = spec.stores[0].views.addresses(pieces.shard)
        return views, pieces.document, [mapped]
    views, places = np.empty(len(pieces.length), dtype=np.uint64), pieces.document.copy()
    alive: list[object] = []
    for source in np.unique(pieces.source).tolist():
        rows = np.flatnonzero(pieces.source == source)
        order = spec.objectives[source] if spec.objectives else None
        if order is None:
            views[rows], mapped = spec.stores[source].views.addresses(pieces.shard[rows])
            alive.append(mapped)
            continue
        for row in rows.tolist():
            view = document_view(*_rearranged(order, spec.stores[source], pieces, row))
            views[row], places[row] = view.address, 0
            alive.append(view)
    return views, places, alive


def _gather_reference(pieces: Pieces, row_tokens: int, spec: BatchSpec) -> GatheredRow:
    """The row of ``pieces``; no padding position reaches ``pack_tokens``, a model's last position."""
    contents = _read(pieces, spec)
    span_offsets = torch.from_numpy(contents.span_offsets)
    spans, row_weight = expand_loss_mask(
        torch.from_numpy(contents.spans),
        torch.from_numpy(contents.span_weights),
        span_offsets,
        torch.from_numpy(pieces.start),
        torch.from_numpy(np.diff(contents.offsets)),
        torch.from_numpy(contents.document_tokens),
        torch.from_numpy(np.array(spec.loss_weights, dtype=np.float64)[pieces.source]),
        spec.loss_reduction,
    )
    input_ids, position_ids, borders, rows, targets, _ = pack_sequences(
        torch.from_numpy(contents.tokens),
        torch.from_numpy(contents.offsets),
        torch.from_numpy(contents.has_lookahead),
        spans,
        span_offsets,
        row_tokens,
        spec.pad_id,
        len(row_weight),
    )
    num_tokens = int(borders[-2])
    position_ids[num_tokens:] %= spec.pack_tokens
    # Span by span: the sum is then the same in any implementation.
    counts = spans.diff(dim=1).flatten().long()
    counts = counts[counts > 0]
    of_spans = row_weight[counts.cumsum(0) - counts].double() * counts
    return GatheredRow(
        input_ids=input_ids.int()[None],
        position_ids=position_ids.int()[None],
        cu_seqlens=borders if num_tokens < row_tokens else borders[:-1],
        rows=rows.int(),
        targets=targets.int(),
        row_weight=row_weight,
        num_tokens=num_tokens,
        max_seqlen=int(borders.diff().max()),
        data_hash=hash_row(pieces, input_ids.int().numpy()),
        weight_sum=float(np.cumsum([0.0, *of_spans.tolist()])[-1]),
    )


def filler(spec: BatchSpec) -> PackedBatch:
    """The micro-batch of a rank that has no pack left: one short document that supervises nothing."""
    none = torch.empty(0, dtype=torch.int32)
    empty32, empty64 = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
    return PackedBatch(
        input_ids=torch.full((1, FILLER_TOKENS), spec.pad_id, dtype=torch.int32),
        position_ids=torch.arange(FILLER_TOKENS, dtype=torch.int32)[None],
        cu_seqlens=torch.tensor([0, FILLER_TOKENS], dtype=torch.int32),
        max_seqlen=FILLER_TOKENS,
        rows=none,
        targets=none,
        row_weight=torch.empty(0, dtype=torch.float32),
        pieces=Pieces(empty32, empty32, empty64, empty64, empty32, empty32),
        num_tokens=0,
        num_padding_tokens=FILLER_TOKENS,
        is_filler=True,
        weight_sum=0.0,
        data_hash=0,
    )


def join_packs(packs: Sequence[Pieces]) -> Pieces:
    """The pieces of all packs, in order."""
    if len(packs) == 1:
        return packs[0]
    return Pieces(
        source=np.concatenate([pack.source for pack in packs]),
        shard=np.concatenate([pack.shard for pack in packs]),
        document=np.concatenate([pack.document for pack in packs]),
        start=np.concatenate([pack.start for pack in packs]),
        length=np.concatenate([pack.length for pack in packs]),
        epoch=np.concatenate([pack.epoch for pack in packs]),
    )


def _read(pieces: Pieces, spec: BatchSpec) -> _Contents:
    """Read the pieces, one shard after the other."""
    num_pieces = len(pieces.length)
    document_tokens = np.empty(num_pieces, dtype=np.int64)
    first_token = np.empty(num_pieces, dtype=np.int64)
    shard_tokens: list[npt.NDArray[np.generic]] = [np.empty(0)] * num_pieces
    span_pieces, spans, span_weights = [], [], []
    for rows in _rows_by_shard(pieces):
        source, shard = int(pieces.source[rows[0]]), int(pieces.shard[rows[0]])
        index = spec.stores[source].index(shard)
        documents = pieces.document[rows]
        objective = spec.objectives[source] if spec.objectives else None
        if objective is not None:
            for row in rows.tolist():
                ids, learned = _rearranged(objective, spec.stores[source], pieces, row)
                shard_tokens[row], document_tokens[row], first_token[row] = ids, len(ids), pieces.start[row]
                span_pieces.append(np.full(len(learned), row))
                spans.append(learned)
                span_weights.append(np.ones(len(learned), dtype=np.float32))
            continue
        document_tokens[rows] = index.lengths[documents]
        first_token[rows] = index.token_offsets[documents] + pieces.start[rows]
        stored = np.asarray(spec.stores[source].tokens(shard))
        for row in rows.tolist():
            spec.stores[source].views.verify_document(shard, int(pieces.document[row]))
            shard_tokens[row] = stored
        first_span = np.asarray(index.span_offsets)[documents]
        num_spans = np.asarray(index.span_offsets)[documents + 1] - first_span
        chosen = _ranges(first_span, num_spans)
        span_pieces.append(np.repeat(rows, num_spans))
        spans.append(np.asarray(index.spans)[chosen])
        span_weights.append(np.asarray(index.span_weights)[chosen])
    if spec.truncate_overlong:
        document_tokens = np.minimum(document_tokens, spec.pack_tokens)

    has_lookahead = pieces.start + pieces.length < document_tokens
    counts = pieces.length.astype(np.int64) + has_lookahead
    offsets = _offsets(counts)
    tokens = np.empty(int(offsets[-1]), dtype=np.int32)
    places = zip(shard_tokens, first_token.tolist(), counts.tolist(), offsets.tolist(), strict=False)
    for stored, first, count, at in places:
        tokens[at : at + count] = stored[first : first + count]

    span_piece = np.concatenate(span_pieces)
    order = np.argsort(span_piece, kind="stable")
    return _Contents(
        tokens=tokens,
        offsets=offsets,
        has_lookahead=has_lookahead,
        document_tokens=document_tokens,
        spans=np.concatenate(spans)[order],
        span_weights=np.concatenate(span_weights)[order],
        span_offsets=_offsets(np.bincount(span_piece, minlength=num_pieces)),
    )


def _rearranged(
    order: ObjectiveOrder, store: SourceStore, pieces: Pieces, row: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The document of a piece as its epoch trains on it: tokens and supervised targets."""
    shard, document = int(pieces.shard[row]), int(pieces.document[row])
    store.views.verify_document(shard, document)
    begin, end = store.index(shard).token_offsets[document : document + 2].tolist()
    stored = np.asarray(store.tokens(shard)[begin:end]).astype(np.int32)
    ids, learned = order.rearrange(int(pieces.epoch[row]), shard, document, stored)
    return ids, learned.astype(np.int32)


def _rows_by_shard(pieces: Pieces) -> list[npt.NDArray[np.int64]]:
    """Row numbers of the pieces, grouped by (source, shard)."""
    keys = (pieces.source.astype(np.int64) << 32) | pieces.shard
    order = np.argsort(keys, kind="stable")
    borders = np.flatnonzero(np.diff(keys[order])) + 1
    return np.split(order, borders)


def _offsets(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _ranges(first: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``[first[0], ..., first[0] + counts[0] - 1, first[1], ...]``."""
    offsets = _offsets(counts)
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(first - offsets[:-1], counts)

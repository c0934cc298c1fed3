"""The plan: from lengths to the packs of every optimizer step, the same on every rank and from any cursor.

Documents are drawn into a window, the window is packed, and steps take its packs: shuffled where packing has sorted by
length (best-fit-decreasing), else in the order drawn. A step may straddle windows; a window never straddles stages, and
ends where a source's epoch ends, so that no pass over a source mixes with the next one. No pack outlives its window, so
a cursor is the window's start and a count of packs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsft.constants import ORDER_VERSION
from dsft.errors import CheckpointError
from dsft.sampling.mixture import DrawnDocuments, Mixture
from dsft.sampling.order import SourceOrder
from dsft.sampling.packing import (
    Overlong,
    PackingMethod,
    best_fit_decreasing,
    pack_documents,
    reorder_packs,
    split_documents,
)
from dsft.sampling.permutation import Permutation, derive_key, stream_key
from dsft.sampling.types import Cursor, Pieces, PlannedSource, SourcePosition, Stage, StepPlan

EPOCH_WINDOW_PACKS = 32
"""A window ends with an epoch only from so many packs of tokens on. A pass over a small source would else fill its last
pack badly again and again: half a pack is lost in each window on average, 1.6 % of 32, and nothing of 1,953 (16 M)."""


@dataclass(frozen=True, slots=True)
class SourceStats:
    """What has been planned of one source since the last call of ``Planner.steps`` (whole windows).

    Attributes:
        name: the source's name.
        epoch: the pass over the source that it is in, from 0.
        num_documents, num_tokens: drawn (tokens as planned: after the overlong policy).
        num_split: documents cut into several pieces.
        num_truncated, truncated_tokens: documents cut short, and the tokens cut off.
        num_dropped, dropped_tokens: documents not used, and their tokens.
    """

    name: str
    epoch: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_split: int = 0
    num_truncated: int = 0
    truncated_tokens: int = 0
    num_dropped: int = 0
    dropped_tokens: int = 0


class Window(NamedTuple):
    """A planned window: its packs, and the cursors before and after it."""

    cursor: Cursor
    next_cursor: Cursor
    ends_stage: bool
    pieces: Pieces
    offsets: npt.NDArray[np.int64]
    tokens_before_pack: npt.NDArray[np.int64]

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1

    def packs(self, begin: int, end: int) -> tuple[Pieces, list[Pieces]]:
        """Pieces of the packs ``[begin, end)``, and these packs one by one."""
        bounds = self.offsets[begin : end + 1].tolist()
        return self.pieces.take(slice(bounds[0], bounds[-1])), _cut(self.pieces, bounds)

    def tokens_trained(self, packs_used: int) -> int:
        return self.cursor.tokens_drawn + int(self.tokens_before_pack[packs_used])

    def cursor_at(self, packs_used: int) -> Cursor:
        return self.next_cursor if packs_used == self.num_packs else replace(self.cursor, pack=packs_used)


class Planner:
    """Plans training data from document lengths.

    Args:
        sources: in the configuration's order.
        stages: in order; the last one holds to the end of training, whatever its ``until_tokens``.
        seed: the run's seed.
        pack_tokens: most tokens of a pack.
        global_batch_packs: packs of a step.
        window_documents, window_tokens: a window ends with the draw that reaches either.
        group_shards: shards whose documents are shuffled together.
        overlong: what becomes of a document longer than a pack.
        train_tokens: training ends with the draw that reaches this many tokens; None: never.
        packing: how a window's documents become packs.
    """

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        stages: Sequence[Stage],
        *,
        seed: int,
        pack_tokens: int,
        global_batch_packs: int,
        window_documents: int,
        window_tokens: int,
        group_shards: int,
        overlong: Overlong,
        train_tokens: int | None,
        packing: PackingMethod = "best_fit_decreasing",
    ) -> None:
        assert all(len(stage.weights) == len(sources) and any(stage.weights) for stage in stages), stages
        self._stages = tuple(stages)
        self._pack_tokens = pack_tokens
        self._global_batch_packs = global_batch_packs
        self._window_documents = window_documents
        self._window_tokens = window_tokens
        self._packing: PackingMethod = packing
        self._train_tokens = train_tokens
        self._pack_key = stream_key(seed, "packs")
        self._orders = [
            SourceOrder(source, seed=seed, group_shards=group_shards, pack_tokens=pack_tokens, overlong=overlong)
            for source in sources
        ]
        self._stats = tuple(SourceStats(source.name) for source in sources)

    def start(self) -> Cursor:
        """The cursor before the first document."""
        num_sources = len(self._orders)
        return Cursor(
            window=0,
            pack=0,
            window_end_tokens=self._train_tokens,
            tokens_drawn=0,
            stage=0,
            stage_tokens_drawn=(0,) * num_sources,
            sources=(SourcePosition(epoch=0, group=0, ordinal=0, tokens_drawn=0),) * num_sources,
        )

    def stats(self) -> tuple[SourceStats, ...]:
        """Per source, what has been planned since the last call of :meth:`steps`. Safe to call from another thread."""
        return self._stats

    def steps(self, cursor: Cursor) -> Iterator[StepPlan]:
        """The steps from ``cursor`` to the end of training. Plans a window when a step first needs it.

        Raises:
            DataError: a source that the mixture draws from has no document that can be used.
            CheckpointError: the cursor does not fit these sources.
        """
        packs: list[Pieces] = []
        parts: list[Pieces] = []  # the same pieces, in one part a window
        stage, ends_stage = cursor.stage, False
        trained = 0
        after = cursor
        for window in self.windows(cursor):
            used = window.cursor.pack
            while used < window.num_packs:
                if not packs:
                    if self._is_shortened(window, used):
                        return
                    stage, ends_stage = window.cursor.stage, False
                taken = min(self._global_batch_packs - len(packs), window.num_packs - used)
                part, part_packs = window.packs(used, used + taken)
                parts.append(part)
                packs.extend(part_packs)
                used += taken
                ends_stage |= window.ends_stage and used == window.num_packs
                trained, after = window.tokens_trained(used), window.cursor_at(used)
                if len(packs) == self._global_batch_packs:
                    yield _step(packs, parts, after, trained, stage, ends_stage)
                    packs, parts = [], []
        if packs:
            yield _step(packs, parts, after, trained, stage, ends_stage)

    def _is_shortened(self, window: Window, packs_used: int) -> bool:
        """Training was made shorter since this half-used window was planned, and its new end is reached."""
        if self._train_tokens is None or window.cursor.window_end_tokens == self._train_tokens:
            return False
        return window.tokens_trained(packs_used) >= self._train_tokens

    def windows(self, cursor: Cursor) -> Iterator[Window]:
        """The windows that the steps from ``cursor`` on are taken from. Errors as :meth:`steps`."""
        if len(cursor.sources) != len(self._orders) or cursor.stage >= len(self._stages):
            raise CheckpointError(
                f"the checkpoint's data position is of {len(cursor.sources)} sources and stage {cursor.stage}, but the "
                f"run has {len(self._orders)} sources and {len(self._stages)} stages. Resume with the data section "
                "that the checkpoint was made with."
            )
        self._stats = tuple(SourceStats(entry.name) for entry in self._stats)
        mixture = Mixture(self._orders, cursor.sources)
        if cursor.pack == 0:
            cursor = replace(cursor, window_end_tokens=self._train_tokens)
        while cursor.window_end_tokens is None or cursor.tokens_drawn < cursor.window_end_tokens:
            window = self._plan_window(mixture, cursor)
            if window is None:
                return
            if cursor.pack >= window.num_packs:
                raise CheckpointError(
                    f"the checkpoint stands after pack {cursor.pack} of window {cursor.window}, but that window has "
                    f"only {window.num_packs} packs: the token store or the data section was another one."
                )
            yield window
            cursor = window.next_cursor

    def _plan_window(self, mixture: Mixture, cursor: Cursor) -> Window | None:
        stage = self._stages[cursor.stage]
        limits = [cursor.tokens_drawn + self._window_tokens, self._stage_end(cursor.stage), cursor.window_end_tokens]
        documents = mixture.draw(
            stage.weights,
            cursor.stage_tokens_drawn,
            self._window_documents,
            min(limit for limit in limits if limit is not None) - cursor.tokens_drawn,
            EPOCH_WINDOW_PACKS * self._pack_tokens,
        )
        if documents is None:
            return None
        row, start, length, packing = pack_documents(documents.planned, self._pack_tokens, self._packing)
        if self._packing == "best_fit_decreasing":
            shuffle = Permutation(len(packing.offsets) - 1, derive_key(self._pack_key, cursor.window))
            packing = reorder_packs(packing, shuffle(np.arange(shuffle.size, dtype=np.int64)))
        pieces = _make_pieces(documents, row, start, length, packing.pieces)
        tokens_before_piece = np.concatenate(([0], np.cumsum(pieces.length, dtype=np.int64)))
        next_cursor = self._next_cursor(cursor, documents, mixture.positions)
        self._stats = _add_to_stats(self._stats, documents, mixture.positions, np.bincount(row) > 1)
        return Window(
            cursor=cursor,
            next_cursor=next_cursor,
            ends_stage=next_cursor.stage != cursor.stage
            or (self._train_tokens is not None and next_cursor.tokens_drawn >= self._train_tokens),
            pieces=pieces,
            offsets=packing.offsets,
            tokens_before_pack=tokens_before_piece[packing.offsets],
        )

    def _stage_end(self, stage: int) -> int | None:
        return None if stage == len(self._stages) - 1 else self._stages[stage].until_tokens

    def _next_cursor(self, cursor: Cursor, documents: DrawnDocuments, positions: tuple[SourcePosition, ...]) -> Cursor:
        tokens_drawn = cursor.tokens_drawn + documents.num_tokens
        # Sums of a window's tokens are far below 2^53, so exact in float64.
        drawn = np.bincount(documents.source, weights=documents.planned, minlength=len(self._orders)).astype(np.int64)
        stage = cursor.stage
        stage_tokens_drawn = np.array(cursor.stage_tokens_drawn, dtype=np.int64) + drawn
        while (end := self._stage_end(stage)) is not None and tokens_drawn >= end:
            stage += 1
            stage_tokens_drawn = np.zeros(len(self._orders), dtype=np.int64)
        return Cursor(
            window=cursor.window + 1,
            pack=0,
            window_end_tokens=self._train_tokens,
            tokens_drawn=tokens_drawn,
            stage=stage,
            stage_tokens_drawn=tuple(stage_tokens_drawn.tolist()),
            sources=positions,
        )


def plan_once(lengths: Sequence[npt.NDArray[np.int32]], pack_tokens: int) -> list[Pieces]:
    """Every document of one source exactly once, packed, in a fixed order: for evaluation.

    Args:
        lengths: per shard, int32[N] tokens per document. Overlong documents are split; empty ones have no piece.
        pack_tokens: most tokens of a pack.

    Returns:
        The packs. Source 0, epoch 0.
    """
    counts = [len(column) for column in lengths]
    flat = np.concatenate([np.zeros(0, dtype=np.int32), *lengths])
    used = np.flatnonzero(flat)
    shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    number = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(count, dtype=np.int64) for count in counts)])
    zeros = np.zeros(len(used), dtype=np.int64)
    documents = DrawnDocuments(
        source=zeros.astype(np.int32),
        epoch=zeros.astype(np.int32),
        shard=shard[used],
        document=number[used],
        length=flat[used],
        planned=flat[used],
        dropped=zeros,
        dropped_tokens=zeros,
    )
    row, start, length = split_documents(documents.planned, pack_tokens)
    packing = best_fit_decreasing(length, pack_tokens)
    pieces = _make_pieces(documents, row, start, length, packing.pieces)
    return _cut(pieces, packing.offsets.tolist())


def hash_packs(packs: Sequence[Pieces]) -> int:
    """63-bit hash of packs and of the order version. Equal on every machine (columns hashed as little-endian)."""
    return _hash_parts([len(pack.length) for pack in packs], packs)


def _hash_parts(pack_sizes: list[int], parts: Sequence[Pieces]) -> int:
    """Hash of packs of so many pieces each; their pieces may come in any parts."""
    state = hashlib.blake2b(digest_size=8)
    state.update(np.array([ORDER_VERSION, *pack_sizes], dtype="<i8").tobytes())
    for name in ("source", "shard", "document", "start", "length", "epoch"):
        for part in parts:
            state.update(getattr(part, name).astype("<i8").tobytes())
    return int.from_bytes(state.digest(), "little") >> 1


def _step(
    packs: list[Pieces], parts: list[Pieces], after: Cursor, tokens_trained: int, stage: int, ends_stage: bool
) -> StepPlan:
    return StepPlan(
        packs=tuple(packs),
        cursor_after=after,
        num_tokens=sum(int(part.length.sum(dtype=np.int64)) for part in parts),
        tokens_trained=tokens_trained,
        stage=stage,
        ends_stage=ends_stage,
        plan_hash=_hash_parts([len(pack.length) for pack in packs], parts),
    )


def _cut(pieces: Pieces, bounds: list[int]) -> list[Pieces]:
    """``pieces[bounds[i]:bounds[i + 1]]`` for each i."""
    return [pieces.take(slice(begin, end)) for begin, end in pairwise(bounds)]


def _make_pieces(
    documents: DrawnDocuments,
    row: npt.NDArray[np.int64],
    start: npt.NDArray[np.int64],
    length: npt.NDArray[np.int32],
    order: npt.NDArray[np.int64],
) -> Pieces:
    row = row.take(order)
    return Pieces(
        source=documents.source.take(row),
        shard=documents.shard.take(row),
        document=documents.document.take(row),
        start=start.take(order),
        length=length.take(order),
        epoch=documents.epoch.take(row),
    )


def _add_to_stats(
    stats: tuple[SourceStats, ...],
    documents: DrawnDocuments,
    positions: tuple[SourcePosition, ...],
    is_split: npt.NDArray[np.bool_],
) -> tuple[SourceStats, ...]:
    """``stats`` with a window's documents added; ``is_split``: which of them are cut into pieces.

    The sums are far below 2^53, so exact in float64.
    """

    def by_source(values: npt.NDArray[np.generic]) -> list[int]:
        if not values.any():
            return [0] * len(stats)
        sums = np.bincount(documents.source, weights=values, minlength=len(stats))
        return [int(total) for total in sums]

    num_documents = np.bincount(documents.source, minlength=len(stats)).tolist()
    num_tokens = by_source(documents.planned)
    num_split = by_source(is_split)
    cut = documents.length - documents.planned
    num_truncated, truncated_tokens = by_source(cut > 0), by_source(cut)
    num_dropped, dropped_tokens = by_source(documents.dropped), by_source(documents.dropped_tokens)
    return tuple(
        SourceStats(
            name=entry.name,
            epoch=position.epoch,
            num_documents=entry.num_documents + num_documents[number],
            num_tokens=entry.num_tokens + num_tokens[number],
            num_split=entry.num_split + num_split[number],
            num_truncated=entry.num_truncated + num_truncated[number],
            truncated_tokens=entry.truncated_tokens + truncated_tokens[number],
            num_dropped=entry.num_dropped + num_dropped[number],
            dropped_tokens=entry.dropped_tokens + dropped_tokens[number],
        )
        for number, (entry, position) in enumerate(zip(stats, positions, strict=True))
    )

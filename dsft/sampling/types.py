"""Values at the seams of the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dsft.sampling.objectives import ObjectiveOrder

Exhausted = Literal["repeat", "stop", "error"]


Growth = tuple[tuple[int, int], ...]
"""How a source has grown: pairs (epoch, number of shards), ascending; passes before that epoch had so many shards."""


def shards_of_pass(num_shards: int, growth: Growth, epoch: int) -> int:
    """Shards in one pass over a source that has ``num_shards`` today."""
    return next((number for until, number in growth if epoch < until), num_shards)


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """What the plan needs to know of a source: its number of shards, and each shard's document lengths when asked.

    Attributes:
        name: the source's name in the YAML.
        num_shards: shards of the listing.
        lengths: shard number -> int32[N] tokens per document. May wait for a shard that is still being prepared; it is
            only called from the prefetch thread.
        objective: how an epoch changes its documents; None: not at all.
        will_need: shard numbers that will be read soon, the first ones first; for sources that fetch them. Returns at
            once.
        exhausted: what happens when its documents are used up and one more is due: the next pass, the end of training,
            or an error.
        growth: passes that began before the source had all its shards.
    """

    name: str
    num_shards: int
    lengths: Callable[[int], npt.NDArray[np.int32]]
    objective: ObjectiveOrder | None = None
    exhausted: Exhausted = "repeat"
    will_need: Callable[[Sequence[int]], None] | None = None
    growth: Growth = ()

    def num_shards_in(self, epoch: int) -> int:
        """Shards of a pass: a source that grew between two starts of a run grew from one of its passes on."""
        return shards_of_pass(self.num_shards, self.growth, epoch)

    def lengths_in(self, epoch: int, shard: int) -> npt.NDArray[np.int32]:
        """Tokens of each document as an epoch trains on it, int32[N]: before the overlong policy."""
        lengths = np.asarray(self.lengths(shard), dtype=np.int32)
        return lengths if self.objective is None else self.objective.planned(epoch, shard, lengths)


@dataclass(frozen=True, slots=True)
class Stage:
    """Mixture weights (one per source, in the sources' order) until ``until_tokens`` drawn; None: to the end."""

    name: str
    until_tokens: int | None
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Columns over pieces; equal lengths.

    Attributes:
        source: int32, position of the source in the configuration.
        shard: int32.
        document: int64, document number inside its shard.
        start: int64, first token inside the document.
        length: int32, tokens.
        epoch: int32, pass over the source.
    """

    source: npt.NDArray[np.int32]
    shard: npt.NDArray[np.int32]
    document: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    epoch: npt.NDArray[np.int32]

    def take(self, rows: npt.NDArray[np.int64] | slice) -> Pieces:
        """The pieces at ``rows``, in that order."""
        return Pieces(
            self.source[rows],
            self.shard[rows],
            self.document[rows],
            self.start[rows],
            self.length[rows],
            self.epoch[rows],
        )


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """Where a source stands: the next document is ``ordinal`` of the shuffled ``group`` of ``epoch``."""

    epoch: int
    group: int
    ordinal: int
    tokens_drawn: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """The position of training in the data: a few dozen bytes, equal on all ranks, independent of the world size.

    Attributes:
        window: number of the window being read.
        pack: packs of that window that steps have already used.
        window_end_tokens: the end of training (in tokens drawn) as it was when this window was planned; None: no end.
            Kept so that extending ``train.tokens`` on resume does not re-plan a window that is half used.
        tokens_drawn: document tokens drawn before this window.
        stage: stage at the window's start.
        stage_tokens_drawn: per source, tokens drawn in this stage before this window.
        sources: per source, its position at the window's start.
    """

    window: int
    pack: int
    window_end_tokens: int | None
    tokens_drawn: int
    stage: int
    stage_tokens_drawn: tuple[int, ...]
    sources: tuple[SourcePosition, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimizer step trains on, before any rank is dealt a part of it.

    Attributes:
        packs: the packs of the step, at most ``global_batch_packs`` (fewer only at the end of training).
        cursor_after: where the next step begins.
        num_tokens: document tokens of the packs (no padding).
        tokens_trained: document tokens of this and all earlier steps.
        stage: number of the stage that drew them.
        ends_stage: this step holds the last pack of its stage (or of training).
        plan_hash: 63-bit hash of the packs and the order version; ranks compare it before they train.
    """

    packs: tuple[Pieces, ...]
    cursor_after: Cursor
    num_tokens: int
    tokens_trained: int
    stage: int
    ends_stage: bool
    plan_hash: int

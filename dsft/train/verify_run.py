"""Proves what a run was trained on: recomputes the plan, reads the token stores, and compares both with the log.

The log holds one hash a step of what the model was really given (``dsft.batch.hashing``). Here the same hash is made
from the plan and the stores, without the loader and without collating, along the steps that led to the newest
checkpoint. Equal hashes mean: these documents, these tokens, in this step, on whatever number of ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from dsft.batch.collate import join_packs
from dsft.batch.hashing import HASH_MASK, piece_hashes
from dsft.config.models import RunConfig
from dsft.errors import DataError
from dsft.sampling.cursor import cursor_from_json
from dsft.sampling.objectives import ObjectiveOrder, objective_from_json
from dsft.sampling.packing import planned_lengths
from dsft.sampling.plan import Planner
from dsft.sampling.types import Cursor, Pieces, PlannedSource, StepPlan, shards_of_pass
from dsft.sampling.usage import Usage
from dsft.store.reader import SourceStore, verify_shard
from dsft.train.attempts import Lineage, Segment, read_lineage
from dsft.train.setup import plan_sources, planned_sources
from dsft.train.store_identity import is_known_as
from dsft.train.stores import open_places

MOST_PROBLEMS = 20
"""Problems reported one by one."""


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One pass over a source: documents used whole and once, used in part, and in the pass altogether."""

    epoch: int
    documents: int
    partly_used: int
    documents_of_pass: int
    tokens: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A part of the plan that was left out on purpose, because the run had gone back after a loss spike.

    Attributes:
        after_step: the step after which it would have come.
        steps, tokens: of the plan.
        cause: why, as the run wrote it down.
    """

    after_step: int
    steps: int
    tokens: int
    cause: str


@dataclass(frozen=True, slots=True)
class RunReport:
    """What was proved, and what was not.

    Attributes:
        run: the run folder.
        checkpoint: the checkpoint whose steps were checked; None: the run has none, the logged steps were checked.
        steps, tokens: checked.
        steps_without_update: of the checked ones: their update was skipped (not finite, or nothing supervised), so that
            their documents were given to the model and not learned.
        superseded_steps: logged steps outside the lineage (run again later, or never committed).
        attempts: per attempt on the lineage: its id, first and last step, world size.
        sources: source name -> its passes.
        passed_over: parts of the plan that were left out on purpose; what is between them was given without a gap.
        problems: one line each; empty: the run is proved.
        num_problems: all of them, also those beyond the first ones that ``problems`` holds.
    """

    run: str
    checkpoint: str | None
    steps: int
    tokens: int
    steps_without_update: int
    superseded_steps: int
    attempts: tuple[dict[str, str | int], ...]
    sources: dict[str, tuple[EpochReport, ...]]
    passed_over: tuple[PassedOver, ...]
    problems: tuple[str, ...]
    num_problems: int

    @property
    def is_proved(self) -> bool:
        """Every step was given exactly what the plan says."""
        return self.num_problems == 0


def verify_run(run_dir: Path, progress: Callable[[int, int], None]) -> RunReport:
    """Check every step of the lineage of a run.

    Args:
        run_dir: the run folder.
        progress: called after each step with its number and the last step's.

    Raises:
        DataError, CheckpointError: nothing can be checked: no log, no store, a configuration of another version.
    """
    lineage = read_lineage(run_dir)
    check = _Check(lineage)
    cursor: Cursor | None = None
    for segment in lineage.segments:
        cursor = check.segment(segment, cursor, progress)
        if cursor is None:
            break
    return check.report(run_dir)


@dataclass(slots=True)
class _Mismatch:
    """A step whose logged hash is not the plan's."""

    step: int
    logged: int
    shards: list[tuple[SourceStore, int]]


@dataclass(slots=True)
class _Check:
    """What has been found so far."""

    lineage: Lineage
    problems: list[str] = field(default_factory=list)
    mismatches: list[_Mismatch] = field(default_factory=list)
    expected: dict[int, int] = field(default_factory=dict)
    """Step -> hash by plan and stores."""
    tokens: int = 0
    num_without_update: int = 0
    usage: Usage | None = None
    source_names: tuple[str, ...] = ()
    store_shards: tuple[int, ...] = ()
    passed_over: list[PassedOver] = field(default_factory=list)

    def segment(self, segment: Segment, cursor: Cursor | None, progress: Callable[[int, int], None]) -> Cursor | None:
        """Check one attempt's steps from ``cursor`` (None: the start); returns the cursor after them.

        None where the stores are not the ones of the run, so that there is no plan to go on with.
        """
        config, stores = _open(segment)
        objectives = tuple(
            None if values is None else objective_from_json(values) for values in segment.attempt.objectives
        )
        changed = _changed_stores(segment, stores)
        if changed:
            self.problems += changed
            return None
        sources = _as_then(planned_sources(config, stores, objectives), segment)
        orders = tuple(source.objective for source in sources)
        planner = plan_sources(config, sources)
        if self.usage is None:
            self.usage = Usage(_planned(config, sources), self._shards_of_pass)
            self.source_names = tuple(source.name for source in config.data.sources)
            self.store_shards = tuple(store.num_shards for store in stores)
        cursor = self._pass_over(segment, planner, planner.start() if cursor is None else cursor)
        if cursor is None:
            return None
        plans = planner.steps(cursor)
        last_step = self.lineage.segments[-1].last_step
        for step in range(segment.first_step, segment.last_step + 1):
            plan = next(plans, None)
            if plan is None:
                self.problems.append(f"steps {step} to {segment.last_step}: the plan ends after step {step - 1}")
                return None
            self._step(step, plan, segment, stores, orders)
            cursor = plan.cursor_after
            progress(step, last_step)
        return cursor

    def _shards_of_pass(self, source: int, epoch: int) -> int:
        """By the last attempt, which knows how the source had grown before."""
        last = self.lineage.segments[-1].attempt.stores[source]
        num_shards = last.get("num_shards")
        return self.store_shards[source] if num_shards is None else shards_of_pass(num_shards, last["growth"], epoch)

    def _pass_over(self, segment: Segment, planner: Planner, cursor: Cursor) -> Cursor | None:
        """Where the attempt's first step begins: the steps of the plan from ``cursor`` to there were left out.

        None where the plan has no step that ends there.
        """
        passed = segment.attempt.passed
        if passed is None:
            return cursor
        target, num_steps, num_tokens = cursor_from_json(passed.cursor), 0, 0
        after_step = segment.first_step - 1
        for plan in planner.steps(cursor):
            num_steps, num_tokens = num_steps + 1, num_tokens + plan.num_tokens
            if plan.cursor_after == target:
                self.passed_over.append(PassedOver(after_step, num_steps, num_tokens, passed.cause))
                return target
            if plan.tokens_trained >= passed.tokens:
                break
        self.problems.append(
            f"steps {segment.first_step} to {segment.last_step}: the run went on after step {after_step} at a place in "
            "the data at which no step of the plan ends"
        )
        return None

    def _step(
        self,
        step: int,
        plan: StepPlan,
        segment: Segment,
        stores: Sequence[SourceStore],
        orders: Sequence[ObjectiveOrder | None],
    ) -> None:
        pieces = join_packs(plan.packs)
        expected = self.expected[step] = hash_stored(pieces, stores, orders)
        self.tokens += plan.num_tokens
        assert self.usage is not None
        self.problems += [f"step {step}: by its own plan, {repeat}" for repeat in self.usage.add(pieces)]
        lines = segment.lines[step]
        if not lines:
            self.problems.append(f"step {step}: the data log has no line of it, so nothing shows what it was given")
        elif len(lines) > 1:
            self.problems.append(f"step {step}: attempt {segment.attempt.id[:8]} logged it {len(lines)} times")
        for line in lines[:1]:
            self.num_without_update += not line.get("applied", True)
            if line["tokens"] != plan.num_tokens:
                self.problems.append(
                    f"step {step}: it was given {line['tokens']} tokens, the plan has {plan.num_tokens}"
                )
            if line["data_hash"] != expected:
                shards = sorted(set(zip(pieces.source.tolist(), pieces.shard.tolist(), strict=True)))
                places = [(stores[source], shard) for source, shard in shards]
                self.mismatches.append(_Mismatch(step, line["data_hash"], places))

    def report(self, run_dir: Path) -> RunReport:
        """Explain the mismatches and put everything together."""
        problems = self.problems + list(self._explanations())
        segments = self.lineage.segments
        return RunReport(
            run=str(run_dir),
            checkpoint=None if self.lineage.checkpoint is None else str(self.lineage.checkpoint),
            steps=len(self.expected),
            tokens=self.tokens,
            steps_without_update=self.num_without_update,
            superseded_steps=self.lineage.num_superseded,
            attempts=tuple(
                {
                    "id": segment.attempt.id,
                    "first_step": segment.first_step,
                    "last_step": segment.last_step,
                    "world_size": segment.attempt.world_size,
                }
                for segment in segments
            ),
            sources=self._sources(),
            passed_over=tuple(self.passed_over),
            problems=tuple(problems[:MOST_PROBLEMS]),
            num_problems=len(self.problems) + len(self.mismatches),
        )

    def _explanations(self) -> Iterator[str]:
        """One line a mismatch: another step's documents, a damaged store, or neither."""
        step_of = {expected: step for step, expected in self.expected.items()}
        damage = _damage({place for mismatch in self.mismatches[:MOST_PROBLEMS] for place in mismatch.shards})
        for mismatch in self.mismatches[:MOST_PROBLEMS]:
            other = step_of.get(mismatch.logged)
            if other is not None:
                yield f"step {mismatch.step}: it was given the documents of step {other}"
                continue
            damaged = [damage[place] for place in mismatch.shards if place in damage]
            reason = damaged[0] if damaged else "the documents, or their tokens, were others; the store is undamaged"
            yield f"step {mismatch.step}: it was not given what the plan and the store say: {reason}"

    def _sources(self) -> dict[str, tuple[EpochReport, ...]]:
        found: dict[str, list[EpochReport]] = {name: [] for name in self.source_names}
        if self.usage is not None:
            for entry in self.usage.epochs():
                found[self.source_names[entry.source]].append(
                    EpochReport(
                        epoch=entry.epoch,
                        documents=entry.num_documents,
                        partly_used=entry.num_partly_used,
                        documents_of_pass=self.usage.documents_of_pass(entry.source, entry.epoch),
                        tokens=entry.num_tokens,
                        is_complete=entry.is_complete,
                    )
                )
        return {name: tuple(epochs) for name, epochs in found.items()}


def hash_stored(pieces: Pieces, stores: Sequence[SourceStore], orders: Sequence[ObjectiveOrder | None]) -> int:
    """What ``PackedBatch.data_hash`` of these pieces must be, summed over ranks, from the stores alone."""
    crcs = []
    columns = (pieces.source, pieces.shard, pieces.document, pieces.start, pieces.length, pieces.epoch)
    for source, shard, document, start, length, epoch in zip(*(column.tolist() for column in columns), strict=True):
        offsets, stored = stores[source].index(shard).token_offsets, np.asarray(stores[source].tokens(shard))
        begin, order = int(offsets[document]), orders[source]
        if order is None:
            tokens = stored[begin + start : begin + start + length]
        else:
            whole = stored[begin : int(offsets[document + 1])].astype(np.int32)
            tokens = order.rearrange(epoch, shard, document, whole)[0][start : start + length]
        crcs.append(zlib.crc32(tokens.astype("<i4").data))
    hashes: list[int] = piece_hashes(pieces, np.array(crcs, dtype=np.uint64)).tolist()
    return sum(hashes) & HASH_MASK


def _open(segment: Segment) -> tuple[RunConfig, tuple[SourceStore, ...]]:
    attempt = segment.attempt
    try:
        config = RunConfig.model_validate(attempt.config)
    except ValidationError as error:
        raise DataError(
            f"the configuration of attempt {attempt.id[:8]} (steps {segment.first_step} to {segment.last_step}) is of "
            f"another version of dsft ({error.errors()[0]['msg']}); check the run with the one that trained it."
        ) from error
    places = [store["folder"] for store in attempt.stores]
    return config, tuple(open_places(config, places))


def _changed_stores(segment: Segment, stores: Sequence[SourceStore]) -> list[str]:
    return [
        f"steps {segment.first_step} to {segment.last_step}: the token store {store.place} has fingerprint "
        f"{store.fingerprint[:12]}, and the run was trained on {known['fingerprint'][:12]}: it was prepared anew"
        for store, known in zip(stores, segment.attempt.stores, strict=True)
        if not is_known_as(store, known["fingerprint"], known.get("num_shards", store.num_shards))
    ]


def _as_then(sources: Sequence[PlannedSource], segment: Segment) -> tuple[PlannedSource, ...]:
    """The sources with the shards that they had in an attempt: they may have grown since."""
    return tuple(
        replace(
            source,
            num_shards=known.get("num_shards", source.num_shards),
            growth=tuple((epoch, number) for epoch, number in known.get("growth", ())),
        )
        for source, known in zip(sources, segment.attempt.stores, strict=True)
    )


def _planned(config: RunConfig, sources: Sequence[PlannedSource]) -> Callable[[int, int, int], npt.NDArray[np.int32]]:
    def planned(source: int, epoch: int, shard: int) -> npt.NDArray[np.int32]:
        return planned_lengths(sources[source].lengths_in(epoch, shard), config.data.pack_tokens, config.data.overlong)

    return planned


def _damage(places: set[tuple[SourceStore, int]]) -> dict[tuple[SourceStore, int], str]:
    """The shards among these whose tokens are not those that were written, and how one sees it."""
    found = {}
    for place in places:
        try:
            verify_shard(*place)
        except DataError as error:
            found[place] = str(error)
    return found

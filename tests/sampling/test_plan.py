from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.errors import CheckpointError, DataError
from dsft.sampling.cursor import cursor_from_json, cursor_to_json
from dsft.sampling.packing import Overlong, PackingMethod
from dsft.sampling.plan import Planner, hash_packs, plan_once
from dsft.sampling.types import Cursor, Pieces, PlannedSource, Stage, StepPlan
from tests.support.restore import assert_restores_at_every_step

LENGTHS = [
    [np.random.default_rng(seed).integers(1, longest, 30).astype(np.int32) for seed in range(shards)]
    for shards, longest in ((5, 60), (2, 25), (1, 150))
]
ONE_STAGE = (Stage("all", None, (0.6, 0.3, 0.1)),)
STAGES = (
    Stage("first", 1500, (1.0, 0.0, 0.0)),
    Stage("mixed", 3100, (0.3, 0.4, 0.3)),
    Stage("last", None, (0.0, 1.0, 0.2)),
)


def make_planner(stages: tuple[Stage, ...] = ONE_STAGE, **changes: Any) -> Planner:
    sources = [PlannedSource(f"s{n}", len(shards), shards.__getitem__) for n, shards in enumerate(LENGTHS)]
    arguments: dict[str, Any] = {
        "seed": 3,
        "pack_tokens": 50,
        "global_batch_packs": 4,
        "window_documents": 37,
        "window_tokens": 900,
        "group_shards": 2,
        "overlong": "split",
        "train_tokens": 5000,
    }
    return Planner(sources, stages, **{**arguments, **changes})


def content(step: StepPlan) -> tuple[object, ...]:
    packs = [tuple(getattr(pack, name).tobytes() for name in Pieces.__slots__) for pack in step.packs]
    return (
        *packs,
        step.cursor_after,
        step.num_tokens,
        step.tokens_trained,
        step.stage,
        step.ends_stage,
        step.plan_hash,
    )


def run(planner: Planner, cursor: Cursor | None = None) -> list[StepPlan]:
    return list(planner.steps(cursor or planner.start()))


def rows(steps: list[StepPlan]) -> list[tuple[int, ...]]:
    """(source, epoch, shard, document, start, length) of every piece."""
    names = ("source", "epoch", "shard", "document", "start", "length")
    columns = [np.concatenate([getattr(pack, name) for s in steps for pack in s.packs]).tolist() for name in names]
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("stages", [ONE_STAGE, STAGES])
def test_restores_where_windows_end_with_epochs(stages: tuple[Stage, ...]) -> None:
    """Window limits beyond the whole sources: only epochs and stages end a window."""

    def make() -> Planner:
        return make_planner(stages, pack_tokens=20, window_documents=10**6, window_tokens=10**6, train_tokens=20_000)

    windows = list(make().windows(make().start()))
    assert len(windows) > 5
    steps = run(make())
    for number in range(0, len(steps), 7):
        again = run(make(), steps[number].cursor_after)
        assert [content(step) for step in again] == [content(step) for step in steps[number + 1 :]]


def test_a_small_corpus_is_read_epoch_by_epoch() -> None:
    sources = [PlannedSource("s", len(LENGTHS[0]), LENGTHS[0].__getitem__)]
    planner = Planner(
        sources,
        (Stage("all", None, (1.0,)),),
        seed=3,
        pack_tokens=60,
        global_batch_packs=4,
        window_documents=10**6,
        window_tokens=10**9,
        group_shards=2,
        overlong="split",
        train_tokens=4 * sum(int(column.sum()) for column in LENGTHS[0]),
    )
    epochs = [set(window.pieces.epoch.tolist()) for window in planner.windows(planner.start())]
    assert epochs == [{0}, {1}, {2}, {3}]


@pytest.mark.parametrize("stages", [ONE_STAGE, STAGES])
@pytest.mark.parametrize(
    ("overlong", "packing"),
    [
        ("split", "best_fit_decreasing"),
        ("truncate", "best_fit_decreasing"),
        ("drop", "best_fit_decreasing"),
        ("split", "next_fit"),
        ("split", "concat_and_split"),
        ("truncate", "concat_and_split"),
    ],
)
def test_restores_at_every_step(stages: tuple[Stage, ...], overlong: Overlong, packing: PackingMethod) -> None:
    def iterate(cursor: Cursor) -> Any:
        planner = make_planner(stages, overlong=overlong, packing=packing)
        return planner.steps(cursor_from_json(cursor_to_json(cursor)))

    steps = assert_restores_at_every_step(iterate, make_planner(stages).start(), lambda s: s.cursor_after, content)
    assert len(steps) > 20
    assert len({step.cursor_after.window for step in steps}) > 4


def test_steps_are_full_but_the_last_and_count_their_tokens() -> None:
    steps = run(make_planner())
    assert [len(step.packs) for step in steps[:-1]] == [4] * (len(steps) - 1)
    assert 1 <= len(steps[-1].packs) <= 4
    trained = 0
    for step in steps:
        assert step.num_tokens == sum(int(pack.length.sum()) for pack in step.packs)
        trained += step.num_tokens
        assert step.tokens_trained == trained
        assert max(int(pack.length.sum()) for pack in step.packs) <= 50
    assert steps[-1].cursor_after.tokens_drawn == trained
    assert 5000 <= trained < 5000 + 150
    assert not run(make_planner(), steps[-1].cursor_after)


def test_every_drawn_document_is_whole_and_epochs_have_no_repeats_or_gaps() -> None:
    drawn: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for source, epoch, shard, document, start, length in rows(run(make_planner(train_tokens=20_000))):
        drawn.setdefault((source, epoch, shard, document), []).append((start, length))
    for (source, _, shard, document), parts in drawn.items():
        ends = [start + length for start, length in sorted(parts)]
        assert [start for start, _ in sorted(parts)] == [0, *ends[:-1]]
        assert ends[-1] == LENGTHS[source][shard][document]
    for source, shards in enumerate(LENGTHS):
        epochs = Counter(key[1] for key in drawn if key[0] == source)
        assert sorted(epochs) == list(range(max(epochs) + 1))
        assert all(epochs[epoch] == 30 * len(shards) for epoch in range(max(epochs)))
    assert max(key[1] for key in drawn) >= 3


def test_stages_switch_at_the_draw_that_reaches_their_tokens() -> None:
    steps = run(make_planner(STAGES))
    ends = [step for step in steps if step.ends_stage]
    assert len(ends) == 3
    assert [step.stage for step in ends] == [0, 1, 2]
    assert [step.cursor_after.stage for step in ends] == [1, 2, 2]
    drawn: dict[int, Counter[int]] = {0: Counter(), 1: Counter(), 2: Counter()}
    total = 0
    for window in {step.cursor_after.window: step.cursor_after for step in steps}.values():
        total = window.tokens_drawn
        drawn[window.stage][window.window] = sum(window.stage_tokens_drawn)
    # The window that reaches 1500 tokens ends there, with the document that did it.
    borders = [cursor.tokens_drawn for cursor in {s.cursor_after.window: s.cursor_after for s in steps}.values()]
    first = min(border for border in borders if border >= 1500)
    second = min(border for border in borders if border >= 3100)
    assert first < 1500 + 60
    assert second < 3100 + 150
    assert total >= 5000
    by_source = Counter[int]()
    seen = 0
    for source, *_, length in rows(steps):
        if seen < first:
            assert source == 0
        elif seen >= second:
            assert source != 0
        seen += length
        by_source[source] += length
    assert set(by_source) == {0, 1, 2}


def test_a_tiny_stage_is_passed_over_by_the_draw_that_overshoots_it() -> None:
    stages = (Stage("a", 100, (1.0, 0.0, 0.0)), Stage("b", 101, (0.0, 1.0, 0.0)), Stage("c", None, (0.0, 0.0, 1.0)))
    steps = run(make_planner(stages, train_tokens=1000))
    assert steps[-1].cursor_after.stage == 2
    assert 1 not in {row[0] for row in rows(steps)} or steps[0].packs


@pytest.mark.parametrize("changes", [{"window_documents": 10**6, "window_tokens": 700}, {"window_documents": 11}])
def test_windows_end_at_documents_or_tokens(changes: dict[str, int]) -> None:
    cursors = [step.cursor_after for step in run(make_planner(global_batch_packs=1, **changes))]
    starts = sorted({(cursor.window, cursor.tokens_drawn) for cursor in cursors})
    sizes = np.diff([tokens for _, tokens in starts])
    if "window_tokens" in changes:
        assert ((sizes >= 700) & (sizes < 700 + 150)).all()
    else:
        assert (sizes < 11 * 150).all()
        assert len(starts) > 5000 / (11 * 60)


def test_extending_training_does_not_change_a_window_that_is_half_used() -> None:
    short, long = make_planner(train_tokens=2000), make_planner(train_tokens=5000)
    steps = run(short)
    last_window = steps[-1].cursor_after.window - 1
    stop = max(i for i, step in enumerate(steps) if step.cursor_after.window == last_window and step.cursor_after.pack)
    resumed = run(long, steps[stop].cursor_after)
    # All that the short run still had to do comes first, piece for piece; then training goes on.
    rest = rows(steps[stop + 1 :])
    assert rows(resumed)[: len(rest)] == rest
    assert resumed[-1].tokens_trained >= 5000
    everything = rows(steps[: stop + 1]) + rows(resumed)
    assert len(set(everything)) == len(everything)


def test_extending_training_plans_an_unused_window_with_the_new_end() -> None:
    short, long = (make_planner(global_batch_packs=1, train_tokens=tokens) for tokens in (2000, 5000))
    borders = [(i, s.cursor_after) for i, s in enumerate(run(short)) if s.cursor_after.pack == 0]
    fresh = [step.plan_hash for step in run(long)]
    position, cursor = borders[-2]  # before the last window, which the short run would end early
    assert [step.plan_hash for step in run(long, cursor)] == fresh[position + 1 :]


def test_extending_a_finished_run_goes_on_behind_it() -> None:
    done = run(make_planner(train_tokens=2000))
    more = run(make_planner(train_tokens=5000), done[-1].cursor_after)
    assert more[0].tokens_trained == done[-1].tokens_trained + more[0].num_tokens
    everything = rows(done) + rows(more)
    assert len(set(everything)) == len(everything)


def test_shortening_training_stops_at_the_next_step_that_reaches_it() -> None:
    one_window = {"window_documents": 10**6, "window_tokens": 10**6}
    steps = run(make_planner(train_tokens=5000, **one_window))
    assert steps[2].tokens_trained < 2000
    shortened = make_planner(train_tokens=2000, **one_window)
    resumed = run(shortened, steps[2].cursor_after)
    assert resumed[-1].tokens_trained >= 2000
    assert resumed[-1].tokens_trained - resumed[-1].num_tokens < 2000
    assert not run(shortened, resumed[-1].cursor_after)


def test_training_without_an_end_goes_on() -> None:
    planner = make_planner(train_tokens=None)
    steps = list(islice(planner.steps(planner.start()), 300))
    assert len(steps) == 300
    assert steps[-1].cursor_after.window_end_tokens is None


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_stats_account_for_every_document(overlong: Overlong) -> None:
    planner = make_planner(overlong=overlong, train_tokens=6000)
    steps = run(planner)
    found = planner.stats()
    pieces = rows(steps)
    for number, entry in enumerate(found):
        mine = [row for row in pieces if row[0] == number]
        assert entry.name == f"s{number}"
        assert entry.num_tokens == sum(row[5] for row in mine)
        keys = {row[:4] for row in mine}
        assert entry.num_documents == len(keys)
        full = np.array([LENGTHS[key[0]][key[2]][key[3]] for key in keys])
        assert entry.num_split == (int((full > 50).sum()) if overlong == "split" else 0)
        assert entry.num_truncated == (int((full > 50).sum()) if overlong == "truncate" else 0)
        assert entry.truncated_tokens == (int((full - 50).clip(0).sum()) if overlong == "truncate" else 0)
        assert entry.epoch == steps[-1].cursor_after.sources[number].epoch
    assert (found[2].num_dropped > 0) == (overlong == "drop")
    assert sum(entry.num_tokens for entry in found) == steps[-1].tokens_trained


def test_drop_with_packs_too_short_is_an_error_and_no_endless_loop() -> None:
    lengths = [np.full(40, 9, np.int32)]
    planner = Planner(
        [PlannedSource("books", 1, lengths.__getitem__)],
        (Stage("s", None, (1.0,)),),
        seed=1,
        pack_tokens=8,
        global_batch_packs=2,
        window_documents=10,
        window_tokens=100,
        group_shards=1,
        overlong="drop",
        train_tokens=None,
    )
    with pytest.raises(DataError, match="books"):
        next(planner.steps(planner.start()))


def test_the_hash_sees_every_column_and_the_borders_of_packs() -> None:
    packs = run(make_planner())[0].packs
    hashes = {hash_packs(packs), hash_packs(packs[::-1]), hash_packs(packs[:-1])}
    for name in Pieces.__slots__:
        column = getattr(packs[0], name).copy()
        column[0] += 1
        hashes.add(hash_packs([replace(packs[0], **{name: column}), *packs[1:]]))
    joined = Pieces(*(np.concatenate([getattr(pack, name) for pack in packs]) for name in Pieces.__slots__))
    hashes.add(hash_packs([joined]))
    assert len(hashes) == 3 + len(Pieces.__slots__) + 1
    assert all(0 <= value < 2**63 for value in hashes)


def test_another_process_plans_the_same() -> None:
    script = "from tests.sampling.test_plan import *; print([s.plan_hash for s in run(make_planner(STAGES))])"
    environment = {"PYTHONHASHSEED": "5", "PYTHONPATH": "."}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True).stdout
    assert found.strip() == str([step.plan_hash for step in run(make_planner(STAGES))])


def test_the_order_is_the_one_written_down() -> None:
    """Another value means another data order: raise ORDER_VERSION with it."""
    steps = run(make_planner(STAGES))
    assert (len(steps), steps[0].plan_hash, steps[-1].plan_hash) == (27, 6019064647289213945, 4728384518520991062)


def test_the_seed_changes_the_plan_and_the_batch_size_does_not_change_the_packs() -> None:
    def packs(planner: Planner) -> list[bytes]:
        return [pack.document.tobytes() + pack.shard.tobytes() for step in run(planner) for pack in step.packs]

    assert packs(make_planner(global_batch_packs=3)) == packs(make_planner())
    assert packs(make_planner(seed=4)) != packs(make_planner())


def test_a_cursor_of_other_data_is_refused() -> None:
    step = run(make_planner(STAGES))[3]
    with pytest.raises(CheckpointError, match="sources"):
        run(make_planner(), replace(step.cursor_after, sources=step.cursor_after.sources[:2]))
    with pytest.raises(CheckpointError, match="stage"):
        run(make_planner(), replace(step.cursor_after, stage=2))
    with pytest.raises(CheckpointError, match="packs"):
        run(make_planner(), replace(step.cursor_after, pack=1000))


@settings(max_examples=50, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(0, 300), max_size=20), min_size=1, max_size=4), pack_tokens=st.integers(1, 120)
)
def test_plan_once_has_every_token_exactly_once(shards: list[list[int]], pack_tokens: int) -> None:
    packs = plan_once([np.array(shard, dtype=np.int32) for shard in shards], pack_tokens)
    covered = {(s, d): np.zeros(n, int) for s, shard in enumerate(shards) for d, n in enumerate(shard)}
    for pack in packs:
        assert 0 < pack.length.sum() <= pack_tokens
        for shard, document, start, length in zip(pack.shard, pack.document, pack.start, pack.length, strict=True):
            covered[int(shard), int(document)][start : start + length] += 1
    assert all((tokens == 1).all() for tokens in covered.values())

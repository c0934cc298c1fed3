"""What happens when a source is used up: repeated, the end of training, or an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsft.errors import DataError
from dsft.sampling.plan import Planner
from dsft.sampling.types import Exhausted, Pieces, PlannedSource, Stage, StepPlan
from tests.sampling.test_plan import LENGTHS


def make_planner(
    policies: tuple[Exhausted, ...], weights: tuple[float, ...] = (0.6, 0.3, 0.1), **changes: Any
) -> Planner:
    sources = [
        PlannedSource(f"s{n}", len(shards), shards.__getitem__, exhausted=policy)
        for n, (shards, policy) in enumerate(zip(LENGTHS, policies, strict=True))
    ]
    arguments: dict[str, Any] = {
        "seed": 3,
        "pack_tokens": 50,
        "global_batch_packs": 4,
        "window_documents": 37,
        "window_tokens": 900,
        "group_shards": 2,
        "overlong": "split",
        "train_tokens": None,
    }
    return Planner(sources, (Stage("all", None, weights),), **{**arguments, **changes})


def used(steps: list[StepPlan], source: int) -> list[tuple[int, ...]]:
    """(epoch, shard, document) of the first piece of each document, in order."""
    found = []
    for step in steps:
        for pack in step.packs:
            rows = pack.take(np.flatnonzero((pack.source == source) & (pack.start == 0)))
            assert isinstance(rows, Pieces)
            found += list(zip(rows.epoch.tolist(), rows.shard.tolist(), rows.document.tolist(), strict=True))
    return found


@pytest.mark.parametrize("window_tokens", [900, 10**6])
def test_training_ends_where_the_source_would_be_repeated(window_tokens: int) -> None:
    planner = make_planner(("repeat", "stop", "repeat"), window_tokens=window_tokens, window_documents=10**6)
    steps = list(planner.steps(planner.start()))
    stopped = used(steps, 1)
    assert sorted(stopped) == [(0, shard, document) for shard in range(2) for document in range(30)]
    assert {epoch for epoch, _, _ in used(steps, 2)} == {0}, "no other source is repeated before"
    assert list(planner.steps(steps[-1].cursor_after)) == [], "a resume at the end finds nothing more"


def test_up_to_there_the_order_is_that_of_a_run_that_goes_on() -> None:
    stopping, going = make_planner(("repeat", "stop", "repeat")), make_planner(("repeat",) * 3)
    steps = list(stopping.steps(stopping.start()))
    expected = [step.plan_hash for step, _ in zip(going.steps(going.start()), steps, strict=False)]
    assert len(steps) > 5
    assert [step.plan_hash for step in steps[:-5]] == expected[:-5]


def test_restores_at_every_step() -> None:
    planner = make_planner(("stop", "repeat", "repeat"))
    steps = list(planner.steps(planner.start()))
    for number, step in enumerate(steps):
        rest = make_planner(("stop", "repeat", "repeat")).steps(step.cursor_after)
        assert [one.plan_hash for one in rest] == [one.plan_hash for one in steps[number + 1 :]]


def test_an_error_says_who_and_when() -> None:
    planner = make_planner(("repeat", "error", "repeat"))
    tokens = sum(int(shard.sum()) for shard in LENGTHS[1])
    with pytest.raises(DataError, match=f"data source 's1' is used up after {tokens} tokens.*exhausted: error"):
        list(planner.steps(planner.start()))


def test_no_policy_bites_before_the_end() -> None:
    for policy in ("stop", "error"):
        planner = make_planner(("repeat", policy, "repeat"), train_tokens=1500)  # type: ignore[arg-type]
        same = make_planner(("repeat",) * 3, train_tokens=1500)
        hashes = [[step.plan_hash for step in one.steps(one.start())] for one in (planner, same)]
        assert hashes[0] == hashes[1]
        assert len(hashes[0]) > 3


def test_a_source_that_is_not_drawn_does_not_stop_training() -> None:
    planner = make_planner(("repeat", "repeat", "stop"), weights=(0.5, 0.5, 0.0), train_tokens=20_000)
    assert sum(step.num_tokens for step in planner.steps(planner.start())) >= 20_000

"""Which steps are saved, by number or by cost."""

from __future__ import annotations

from typing import Any

from dsft.train.save_interval import FIRST_STEPS, MAX_OVERHEAD, SaveInterval
from tests.support.alone import ALONE


def due(interval: SaveInterval, steps: range) -> list[int]:
    return [step for step in steps if interval.is_due(step)]


def test_every_so_many_steps_or_never() -> None:
    assert due(SaveInterval(4), range(1, 14)) == [4, 8, 12]
    assert due(SaveInterval(None), range(1, 14)) == []


def test_the_cost_of_the_last_save_sets_the_steps_to_the_next() -> None:
    interval = SaveInterval("auto")
    assert due(interval, range(101, 131)) == [100 + FIRST_STEPS, 100 + 2 * FIRST_STEPS, 100 + 3 * FIRST_STEPS]
    step_seconds, cost_seconds = 2.0, 7.0
    interval.learn(ALONE, cost_seconds, step_seconds)
    found = due(interval, range(131, 1131))
    assert found[0] == 130 + 100
    assert len(found) * cost_seconds <= MAX_OVERHEAD * 1000 * step_seconds < (len(found) + 1) * cost_seconds
    interval.learn(ALONE, 0.0, step_seconds)
    assert due(interval, range(1131, 1135)) == [1131, 1132, 1133, 1134]


def test_the_slowest_rank_decides() -> None:
    class Groups:
        def all_gather_object(self, value: Any) -> list[Any]:
            return [value, [14.0, 1.0], [1.0, None]]

    interval = SaveInterval("auto")
    interval.is_due(1)
    groups: Any = Groups()
    interval.learn(groups, 7.0, 2.0)
    assert due(interval, range(2, 801)) == [400, 800]

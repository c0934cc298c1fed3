"""The overfitting watch on curves: fires on a real one, silent on clean ones, survives a resume at every point."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dsft.evaluate.overfit import OverfitWatch

STEPS = list(range(0, 200, 10))


def _fired(watch: OverfitWatch, held_out: list[float], train: list[float | None], start: int = 0) -> list[int]:
    return [
        step
        for step, loss, train_loss in zip(STEPS[start:], held_out[start:], train[start:], strict=False)
        if watch.observe("set", step, loss, train_loss) is not None
    ]


OVERFITTED = [3.0 - 0.2 * i for i in range(6)] + [2.0 + 0.1 * i for i in range(1, 15)]
FALLING: list[float | None] = [3.0 - 0.1 * i for i in range(20)]


def test_fires_after_patience_evaluations_above_the_best() -> None:
    # Best is evaluation 5 (step 50); evaluations 6, 7, 8 are above it: the third is at step 80.
    fired = _fired(OverfitWatch(patience=3), OVERFITTED, FALLING)
    assert fired == STEPS[8:]
    assert _fired(OverfitWatch(patience=1), OVERFITTED, FALLING)[0] == STEPS[6]


def test_message_names_the_set_and_the_best_step() -> None:
    watch = OverfitWatch(patience=1)
    watch.observe("qa", 10, 2.0, 2.0)
    overfitting = watch.observe("qa", 20, 2.5, 1.5)
    assert overfitting is not None
    assert overfitting.set_name == "qa"
    assert "step 10" in overfitting.message


@pytest.mark.parametrize(
    ("held_out", "train"),
    [
        ([3.0 - 0.1 * i for i in range(20)], FALLING),  # both fall
        (OVERFITTED, [3.0] * 20),  # held-out rises but training does not fall: bad, yet not overfitting
        (OVERFITTED, [None] * 20),  # no linked source
        ([2.0 + 0.0005 * (i % 3) for i in range(20)], FALLING),  # level up to jitter
        ([3.0 - 0.1 * i + (0.3 if i % 3 else 0.0) for i in range(20)], FALLING),  # rises, but never three in a row
        ([math.nan] * 20, FALLING),
    ],
)
def test_silent_on_curves_that_are_not_overfitted(held_out: list[float], train: list[float | None]) -> None:
    assert _fired(OverfitWatch(patience=3), held_out, train) == []


def test_noisy_convergence_is_silent() -> None:
    generator = np.random.default_rng(5)
    for _ in range(50):
        held_out = [1.0 + 2.0 * math.exp(-i / 4) + generator.normal(0, 2e-4) for i in range(20)]
        train = [0.9 + 2.0 * math.exp(-i / 4) + generator.normal(0, 1e-2) for i in range(20)]
        assert _fired(OverfitWatch(patience=3), held_out, list(train)) == []


def test_resume_at_every_evaluation_decides_the_same() -> None:
    expected = _fired(OverfitWatch(patience=3), OVERFITTED, FALLING)
    for cut in range(len(STEPS)):
        before = OverfitWatch(patience=3)
        fired = _fired(before, OVERFITTED[:cut], FALLING[:cut])
        after = OverfitWatch.from_json(3, json.loads(json.dumps(before.to_json())))
        assert fired + _fired(after, OVERFITTED, FALLING, start=cut) == expected


def test_sets_do_not_share_a_history() -> None:
    watch = OverfitWatch(patience=1)
    assert watch.observe("a", 0, 1.0, 1.0) is None
    assert watch.observe("b", 0, 2.0, 1.0) is None
    assert watch.observe("b", 1, 1.9, 0.9) is None
    assert watch.observe("a", 1, 1.1, 0.9) is not None

"""What is a loss spike, and what is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsft.config.spikes import SpikeSection
from dsft.train.spikes import SpikeWatch

SECTION = SpikeSection(window_steps=20, deviations=6.0, confirm_steps=3)


def _noise(number: int, seed: int = 1) -> list[float]:
    return np.random.default_rng(seed).normal(2.5, 0.05, number).tolist()


def _feed(losses: list[float | None], *, stage: int = 0, section: SpikeSection = SECTION) -> list[bool]:
    watch = SpikeWatch(section, {})
    seen = []
    for step, loss in enumerate(losses, 1):
        watch.observe(step, stage, loss, not_finite=False)
        seen.append(watch.is_spike)
    return seen


def test_high_losses_in_a_row_are_a_spike_from_the_first_of_them_on() -> None:
    watch = SpikeWatch(SECTION, {})
    for step, loss in enumerate([*_noise(30), 3.5, 4.0], 1):
        watch.observe(step, 0, loss, not_finite=False)
    assert (watch.first_step, watch.is_spike) == (31, False)
    watch = SpikeWatch(SECTION, json.loads(json.dumps(watch.to_json())))  # a resume decides alike
    watch.observe(33, 0, 5.0, not_finite=False)
    assert (watch.first_step, watch.is_spike) == (31, True)


def test_one_hard_batch_is_none_and_a_good_loss_ends_the_suspicion() -> None:
    watch = SpikeWatch(SECTION, {})
    for step, loss in enumerate([*_noise(30), 9.0, 9.0, 2.5], 1):
        watch.observe(step, 0, loss, not_finite=False)
    assert (watch.first_step, watch.num_high, watch.is_spike) == (None, 0, False)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_loss_are_none(seed: int) -> None:
    assert not any(_feed(_noise(2000, seed)))
    falling = [2.0 + 8.0 * 0.98**step + loss - 2.5 for step, loss in enumerate(_noise(500, seed))]
    assert not any(_feed(falling))
    assert not any(_feed([1.0] * 50 + [1.02] * 50)), "a loss that did not move at all may rise by less than 6 %"


def test_nothing_is_one_before_the_window_is_full() -> None:
    assert not any(_feed([*_noise(17), 50.0, 50.0, 50.0, 50.0]))


def test_another_stage_has_another_loss() -> None:
    watch = SpikeWatch(SECTION, {})
    for step, loss in enumerate(_noise(30), 1):
        watch.observe(step, 0, loss, not_finite=False)
    for step in range(31, 60):
        watch.observe(step, 1, 5.0, not_finite=False)
        assert watch.first_step is None


def test_not_finite_steps_raise_suspicion_but_are_not_counted_here() -> None:
    watch = SpikeWatch(SECTION, {})
    for step in range(1, 9):
        watch.observe(step, 0, float("inf"), not_finite=True)
    watch.observe(9, 0, None, not_finite=False)  # nothing supervised: says nothing
    assert (watch.first_step, watch.num_high, watch.is_spike) == (1, 0, False)


def test_the_limit_is_the_median_and_the_deviation_of_the_normal_distribution() -> None:
    watch = SpikeWatch(SpikeSection(window_steps=10_000, deviations=3.0), {})
    losses = np.random.default_rng(0).normal(2.5, 0.2, 10_000).tolist()
    watch.restore({"losses": losses, "stage": 0})
    assert watch.limit == pytest.approx(2.5 + 3 * 0.2, rel=0.01)

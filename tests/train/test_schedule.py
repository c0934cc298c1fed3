"""Learning-rate shapes against torch's own schedulers and closed forms."""

import math

import pytest
import torch

from dsft.config.schedule import ScheduleSection
from dsft.errors import ConfigError
from dsft.train.schedule import Position, build_schedule


def rates(section: ScheduleSection, steps: int, lr: float = 1.0) -> list[float]:
    schedule = build_schedule(section, lr=lr, steps=steps, tokens=None)
    return [schedule.lr_at(Position(step, 0)) for step in range(steps)]


def test_cosine_equals_torchs_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.3)
    expected = []
    for _ in range(50):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates(ScheduleSection(kind="cosine", min_lr_ratio=0.1), 50, lr=3.0) == pytest.approx(expected, rel=1e-9)


def test_warmup_reaches_the_peak_at_its_last_step() -> None:
    got = rates(ScheduleSection(kind="constant", warmup_steps=4), 8)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_warmup_stable_decay() -> None:
    got = rates(ScheduleSection(kind="warmup_stable_decay", warmup_steps=2, decay_steps=4, min_lr_ratio=0.0), 10)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_linear_ends_at_its_floor() -> None:
    schedule = build_schedule(ScheduleSection(kind="linear", min_lr_ratio=0.2), lr=2.0, steps=10, tokens=None)
    assert schedule.lr_at(Position(0, 0)) == pytest.approx(2.0)
    assert schedule.lr_at(Position(10, 0)) == pytest.approx(0.4)
    assert schedule.lr_at(Position(11, 0)) == pytest.approx(0.4)


def test_token_units_do_not_depend_on_the_step_count() -> None:
    section = ScheduleSection(kind="cosine", warmup_tokens=100, min_lr_ratio=0.0)
    schedule = build_schedule(section, lr=1.0, steps=None, tokens=1100)
    assert schedule.lr_at(Position(1, 600)) == schedule.lr_at(Position(77, 600))
    assert schedule.lr_at(Position(3, 600)) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert schedule.lr_at(Position(0, 0)) > 0


def test_a_decay_is_not_undone_by_a_longer_run() -> None:
    section = ScheduleSection(kind="warmup_stable_decay", decay_steps=4, min_lr_ratio=0.1)
    short, long = (build_schedule(section, lr=1.0, steps=steps, tokens=None) for steps in (10, 20))
    for done, is_refused in ((5, False), (7, False), (8, False), (9, True), (10, True)):
        share = short.share_at(Position(done, 0))
        short.check_no_jump(Position(done, 0), share)
        if is_refused:
            with pytest.raises(ConfigError, match="--allow-lr-jump"):
                long.check_no_jump(Position(done, 0), share)
        else:
            long.check_no_jump(Position(done, 0), share)
    long.check_no_jump(Position(10, 0), None)
    cosine = ScheduleSection(kind="cosine", min_lr_ratio=0.1)
    ended = build_schedule(cosine, lr=1.0, steps=1000, tokens=None).share_at(Position(1000, 0))
    build_schedule(cosine, lr=1.0, steps=1100, tokens=None).check_no_jump(Position(1000, 0), ended)


@pytest.mark.parametrize(
    ("section", "steps", "tokens", "words"),
    [
        (ScheduleSection(kind="warmup_stable_decay"), 10, None, "decay_steps"),
        (ScheduleSection(kind="warmup_stable_decay", decay_steps=5), None, 1000, "decay_tokens"),
        (ScheduleSection(kind="warmup_stable_decay", decay_steps=8, warmup_steps=3), 10, None, "shorten"),
    ],
)
def test_impossible_schedules_are_named(section, steps, tokens, words) -> None:
    with pytest.raises(ConfigError, match=words):
        build_schedule(section, lr=1.0, steps=steps, tokens=tokens)

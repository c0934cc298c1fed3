"""Learning rate as a pure function of the position in the run: nothing to save, nothing to get out of step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsft.config.schedule import ScheduleSection
from dsft.errors import ConfigError

MOST_RISE = 2.0
"""A run that is made a little longer raises the end of its cosine; a schedule begun anew raises it tenfold."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a step stands before it is taken: optimizer steps and document tokens already trained."""

    step: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule whose units are settled.

    Attributes:
        kind: shape after the warm-up.
        lr: peak learning rate.
        min_lr_ratio: learning rate at the end, as a share of the peak (linear, cosine and the final decay).
        in_tokens: True when the run's length is in tokens; ``length`` and ``decay`` then are too.
        length: length of the run.
        warmup: length of the linear warm-up, in tokens when ``warmup_in_tokens``.
        decay: length of the final decay (warmup_stable_decay).
    """

    kind: str
    lr: float
    min_lr_ratio: float
    in_tokens: bool
    length: int
    warmup: int
    warmup_in_tokens: bool
    decay: int

    def lr_at(self, position: Position) -> float:
        """Learning rate of the step that begins at ``position``."""
        return self.lr * self._warmup(position) * self.share_at(position)

    def share_at(self, position: Position) -> float:
        """What is left of the peak learning rate at ``position``, the warm-up aside."""
        done = position.tokens if self.in_tokens else position.step
        return self._shape(min(done, self.length))

    def check_no_jump(self, position: Position, share_before: float | None) -> None:
        """Refuse to go on where the decay of the same run had taken the rate far below what it would be now.

        A decayed model that meets the peak rate again at once forgets what the decay gave it.

        Raises:
            ConfigError: the rate would be more than ``MOST_RISE`` times what it was.
        """
        share = self.share_at(position)
        if share_before is None or share <= MOST_RISE * share_before:
            return
        raise ConfigError(
            f"the learning rate had decayed to {share_before:.1%} of train.lr by step {position.step}, and with the "
            f"run's new length or schedule it would jump back to {share:.1%}. Go on from a checkpoint of before the "
            "decay (--resume <run>/checkpoints/step-<number>), or begin a new run from this one's weights "
            "(model.path), which warms up; --allow-lr-jump goes on all the same."
        )

    def _warmup(self, position: Position) -> float:
        if self.warmup == 0:
            return 1.0
        done = position.tokens if self.warmup_in_tokens else position.step + 1
        # In tokens the first step would have rate 0 and teach nothing: begin one hundredth up.
        return min(1.0, max(done / self.warmup, 0.01))

    def _shape(self, done: int) -> float:
        low = self.min_lr_ratio
        if self.kind == "constant":
            return 1.0
        if self.kind == "warmup_stable_decay":
            left = self.length - done
            return 1.0 if left >= self.decay else low + (1.0 - low) * left / self.decay
        # A warm-up in the other unit (steps against tokens) overlaps the decay instead of shifting it.
        start = self.warmup if self.warmup_in_tokens == self.in_tokens else 0
        progress = min(1.0, max(0.0, (done - start) / max(1, self.length - start)))
        if self.kind == "linear":
            return low + (1.0 - low) * (1.0 - progress)
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(section: ScheduleSection, *, lr: float, steps: int | None, tokens: int | None) -> Schedule:
    """Settle units against the run's length, which is given in steps or in tokens.

    Raises:
        ConfigError: the decay is in a unit in which the run's length is not known, or does not fit into the run.
    """
    in_tokens = tokens is not None
    length = tokens if tokens is not None else steps
    assert length is not None, "the run's length is known in one unit"
    try:
        section.check_fits("tokens" if in_tokens else "steps", length)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    decay = section.decay_tokens if in_tokens else section.decay_steps
    warmup_in_tokens = section.warmup_tokens is not None
    warmup = (section.warmup_tokens if warmup_in_tokens else section.warmup_steps) or 0
    return Schedule(
        kind=section.kind,
        lr=lr,
        min_lr_ratio=section.min_lr_ratio,
        in_tokens=in_tokens,
        length=length,
        warmup=warmup,
        warmup_in_tokens=warmup_in_tokens,
        decay=decay or 0,
    )

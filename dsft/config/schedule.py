"""``train.schedule``: the learning rate's shape, and whether it fits into the run."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dsft.config.section import Section, UnitInterval
from dsft.config.units import Count


class ScheduleSection(Section):
    """Learning-rate schedule, in steps or in trained tokens (not both)."""

    kind: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    warmup_steps: Count | None = None
    warmup_tokens: Count | None = None
    decay_steps: Count | None = None
    """Length of the final decay of warmup_stable_decay."""
    decay_tokens: Count | None = None
    min_lr_ratio: UnitInterval = 0.1
    """Learning rate at the end, as a share of train.lr (0.1 is the usual choice for cosine)."""

    @model_validator(mode="after")
    def _one_unit(self) -> ScheduleSection:
        steps = self.warmup_steps is not None or self.decay_steps is not None
        tokens = self.warmup_tokens is not None or self.decay_tokens is not None
        if steps and tokens:
            raise ValueError("train.schedule: give warmup and decay both in steps or both in tokens")
        if self.kind != "warmup_stable_decay" and (self.decay_steps is not None or self.decay_tokens is not None):
            raise ValueError(
                f"train.schedule: only warmup_stable_decay has a decay of its own length; {self.kind} would ignore it"
            )
        return self

    def check_fits(self, unit: Literal["steps", "tokens"], length: int | None) -> None:
        """Raise ValueError where the decay is missing or in another unit than the run's length, or does not fit.

        Args:
            unit: of the run's length; epochs are counted in tokens.
            length: of the run; None: not known before the data is.
        """
        other = "tokens" if unit == "steps" else "steps"
        if getattr(self, f"decay_{other}") is not None:
            raise ValueError(
                f"train.schedule: this run's length is in {unit}, so the decay must be too; give decay_{unit} instead "
                f"of decay_{other}"
            )
        decay, warmup = getattr(self, f"decay_{unit}"), getattr(self, f"warmup_{unit}")
        if self.kind == "warmup_stable_decay" and decay is None:
            raise ValueError(
                f"train.schedule: kind warmup_stable_decay needs decay_{unit}, the length of its final decay"
            )
        taken = (decay or 0) + (warmup or 0)
        if length is not None and taken > length:
            raise ValueError(
                f"train.schedule: warm-up and decay take {taken:,} {unit}, but the run has only {length:,}; shorten "
                "them"
            )

"""Loss spikes: the loss leaves the range of the steps before it, for several steps in a row.

Pure logic on numbers that are the same on all ranks: no model, no clock. The state is JSON, so that a resumed run
decides as the uninterrupted one.
"""

from __future__ import annotations

import statistics
from typing import Any

from dsft.config.spikes import SpikeSection

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over the median absolute distance from its median: 1 / Phi^-1(3/4)."""
MIN_RELATIVE_DEVIATION = 0.01
"""Of the median: a loss that hardly moves would else spike at the first batch that differs."""


class SpikeWatch:
    """Compares each loss with the median of the ones before it.

    Losses that are high, or not finite, do not enter the comparison; a stage of the data begins it anew, because
    another mixture has another loss.

    Args:
        section: what is a spike.
        state: as :meth:`restore`.

    Attributes:
        section: as given.
        first_step: of the steps with a high or not finite loss that have just been taken in a row; None: the last loss
            was as expected, and a checkpoint may be made.
        num_high: of these, with a high loss.
    """

    def __init__(self, section: SpikeSection, state: dict[str, Any]) -> None:
        self.section = section
        self.restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`to_json` gave; empty: nothing was seen yet."""
        self._losses: list[float] = list(state.get("losses", ()))
        self._stage: int | None = state.get("stage")
        self.first_step: int | None = state.get("first_step")
        self.num_high: int = state.get("num_high", 0)

    def to_json(self) -> dict[str, Any]:
        """For ``TrainState.spikes``."""
        return {
            "losses": self._losses,
            "stage": self._stage,
            "first_step": self.first_step,
            "num_high": self.num_high,
        }

    def observe(self, step: int, stage: int, loss: float | None, *, not_finite: bool) -> None:
        """Take the loss of step ``step`` (nats per token, over all ranks; None: nothing was supervised)."""
        if stage != self._stage:
            self._losses, self._stage = [], stage
        if loss is None:
            return
        is_high = not not_finite and self.limit is not None and loss > self.limit
        if is_high or not_finite:
            self.first_step = step if self.first_step is None else self.first_step
            self.num_high += is_high
        else:
            self.first_step, self.num_high = None, 0
            self._losses = [*self._losses, loss][-self.section.window_steps :]

    @property
    def limit(self) -> float | None:
        """What is above it is high; None: there are too few steps to say."""
        if len(self._losses) < self.section.window_steps:
            return None
        median = statistics.median(self._losses)
        distance = statistics.median(abs(loss - median) for loss in self._losses)
        deviation = max(MAD_TO_DEVIATION * distance, MIN_RELATIVE_DEVIATION * abs(median))
        return median + self.section.deviations * deviation

    @property
    def is_spike(self) -> bool:
        """Enough high losses in a row."""
        return self.num_high >= self.section.confirm_steps

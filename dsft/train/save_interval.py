"""After which steps a run saves: every so many, or as often as costs no more than a small share of its time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dsft.dist import Groups

MAX_OVERHEAD = 0.035
"""Share of the training time that saves may cost (CheckFreq, FAST 2021, section 4.3: at most 3.5 %)."""
FIRST_STEPS = 10
"""Before the first save whose cost is measured."""


class SaveInterval:
    """When the next save is due. Every rank gets the same answers.

    Args:
        every_steps: ``checkpoint.every_steps``.
    """

    def __init__(self, every_steps: int | Literal["auto"] | None) -> None:
        self._every = every_steps
        self._steps = FIRST_STEPS  # auto: from one save to the next
        self._last: int | None = None  # auto: step of the last one

    def is_due(self, step: int) -> bool:
        """Whether this step, which has just been taken, ends an interval. To be asked after each step."""
        if self._every != "auto":
            return self._every is not None and step % self._every == 0
        if self._last is None:
            self._last = step - 1
        if step < self._last + self._steps:
            return False
        self._last = step
        return True

    def go_back(self, step: int) -> None:
        """The run goes on from an older step; the interval begins there."""
        self._last = step

    def learn(self, groups: Groups, cost_seconds: float, step_seconds: float | None) -> None:
        """Choose the steps to the next save by what the last one has cost on the slowest rank. Collective for ``auto``.

        Args:
            cost_seconds: by how much training took longer because of it.
            step_seconds: median of the last steps; None: not known yet.
        """
        if self._every != "auto":
            return
        everyones = groups.all_gather_object([cost_seconds, step_seconds])
        known = [seconds for _, seconds in everyones if seconds]
        if known:
            cost = max(seconds for seconds, _ in everyones)
            self._steps = max(1, math.ceil(cost / (MAX_OVERHEAD * min(known))))

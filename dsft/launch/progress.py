"""Where a rank is: its phase and step, how long a step and a save take. Training writes it, the rank's watch reads."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["start", "step", "evaluate", "save", "end"]
_NUM_REMEMBERED = 33


class Progress:
    """Written by one thread (waits for data: by another), read by a third; attributes are replaced as a whole.

    Attributes:
        phase: what this rank does now.
        step: optimizer steps taken.
        since: ``time.monotonic()`` at which it began.
        save_seconds: how long the last save took to write; None: none yet.
        is_saving: a save is in flight while this rank goes on.
        is_waiting_for_data: it will need data that are still made; however long that takes, it does not hang.
        data_since: ``time.monotonic()`` at which the last such wait ended; 0.0: there was none.
    """

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.step = 0
        self.since = time.monotonic()
        self.save_seconds: float | None = None
        self.is_saving = False
        self.is_waiting_for_data = False
        self.data_since = 0.0
        self._step_seconds: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    def begin(self, phase: Phase, step: int) -> None:
        """This rank begins ``phase`` (again) after ``step`` steps; what it did before has ended."""
        now = time.monotonic()
        if self.phase == "step":
            self._step_seconds.append(now - self.since)
        self.phase, self.step, self.since = phase, step, now

    @contextmanager
    def meanwhile(self, phase: Phase) -> Iterator[None]:
        """Something else, inside of what this rank does and not counted there."""
        outer, outer_since, began = self.phase, self.since, time.monotonic()
        self.phase, self.since = phase, began
        try:
            yield
        finally:
            self.phase, self.since = outer, outer_since + time.monotonic() - began

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around a wait for data that are still made; in the one thread that reads data ahead."""
        self.is_waiting_for_data = True
        try:
            yield
        finally:
            self.data_since = time.monotonic()
            self.is_waiting_for_data = False

    @property
    def median_step_seconds(self) -> float | None:
        """Of the last steps; None before the second (the first one compiles and fills caches)."""
        seconds = list(self._step_seconds)[1:]
        return statistics.median(seconds) if seconds else None

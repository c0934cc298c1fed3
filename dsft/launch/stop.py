"""Stop requests: whoever asks only sets a flag; it travels with the control all-gather, so all ranks stop alike.

Nothing is saved inside a signal handler: the launcher signals its ranks one after the other, up to 30 s apart, and a
save needs all of them.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

STOP_GRACE_SECONDS = 25.0
"""From a SIGTERM to the end of this rank. DeepSpeed's launcher and SLURM (KillWait) kill after 30 s."""


class StopFlag:
    """Context manager that turns SIGTERM, SIGUSR1, SIGUSR2 and the first SIGINT into ``requested``.

    SIGTERM announces a SIGKILL, so it sets a deadline too; the others are requests without one. A second SIGINT raises
    KeyboardInterrupt: the way out for a person at a terminal who does not want to wait. Only in the main thread, as for
    every signal handler in Python. After a stop the signals stay ignored: a launcher that repeats its SIGTERM while
    this process ends would turn the exit code 75 into 143.

    Attributes:
        requested: what asked first; None: nothing yet.
        deadline: ``time.monotonic()`` at which this rank ends itself; None: it may take its time.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.deadline: float | None = None
        self._interrupted = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def request(self, what: str, grace_seconds: float | None = None) -> None:
        """Ask this rank, and through it all others, to stop; the first request is the one that is named.

        Args:
            what: who asks, for a person: ``SIGTERM``, ``the stop file …``.
            grace_seconds: how long this process will live from now; None: no limit.
        """
        if grace_seconds is not None:
            deadline = time.monotonic() + grace_seconds
            self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)
        if self.requested is None:
            self.requested = what

    def seconds_left(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def __enter__(self) -> StopFlag:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous if self.requested is None else signal.SIG_IGN)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.request(signal.Signals(number).name, STOP_GRACE_SECONDS if number == signal.SIGTERM else None)

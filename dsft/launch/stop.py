"""Stop requests: a signal only sets a flag; the loop sends it with the control all-gather, so all ranks stop alike.

Nothing is saved inside a handler: the launcher signals its ranks one after the other, up to 30 s apart, and a save
needs all of them.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Context manager that turns SIGTERM, SIGUSR1, SIGUSR2 and the first SIGINT into ``requested``.

    A second SIGINT raises KeyboardInterrupt: the way out for a person at a terminal who does not want to wait. Only in
    the main thread, as for every signal handler in Python.

    Attributes:
        requested: name of the first signal that came; None: none yet.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupted = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopFlag:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self.requested is None:
            self.requested = signal.Signals(number).name

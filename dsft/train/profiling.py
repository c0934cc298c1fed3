"""``--profile-steps A:B``: a torch profiler trace of a few steps of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsft.errors import ConfigError


def parse_steps(text: str | None) -> range:
    """``"10:12"`` means steps 10 and 11 (0-based, end exclusive); None means no profile.

    Raises:
        ConfigError: the text is not of that form.
    """
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"--profile-steps {text!r}: write FIRST:END, for example 10:12 for steps 10 and 11.")
    return range(int(first), int(last))


class Profiler:
    """Records the steps of a range and writes one Chrome trace into ``folder`` after the last of them."""

    def __init__(self, steps: range, folder: Path, rank: int) -> None:
        self._steps = steps
        self._path = folder / f"trace-rank{rank}.json"
        self._active: Any = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surround one step; does nothing outside the range."""
        if step not in self._steps:
            yield
            return
        if self._active is None:
            from torch.profiler import profile

            self._active = profile()
            self._active.start()
        yield
        if step + 1 not in self._steps:
            self._active.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._active.export_chrome_trace(str(self._path))
            self._active = None

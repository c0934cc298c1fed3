"""``--profile-steps A:B``: a torch profiler trace of a few steps of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsft.errors import ConfigError
from dsft.fsio import save_error


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
            self.close()

    def close(self) -> None:
        """Write the trace of the steps so far, where the run ends before the range does. Does nothing afterwards.

        Raises:
            SaveError: the trace cannot be written.
        """
        if self._active is None:
            return
        active, self._active = self._active, None
        active.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            active.export_chrome_trace(str(self._path))
        except OSError as error:
            raise save_error(self._path, error) from error

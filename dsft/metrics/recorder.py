"""Where records go: ``metrics.jsonl`` always, TensorBoard and trackers when asked for, and the console of rank 0."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsft.errors import SaveError
from dsft.fsio import save_error
from dsft.metrics.console import Console
from dsft.metrics.json_lines import JsonLines
from dsft.metrics.trackers import KINDS, Background, TrackedRun, check_installed

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


class Recorder:
    """Writes records on rank 0; on other ranks it does nothing.

    Args:
        run_dir: folder of the run.
        sinks: ``log.sinks`` of the configuration.
        is_main: this is rank 0.
        console: shows records to a person; None: only the files.
        tracked: what the trackers among ``sinks`` are told of the run; None: none is opened.

    Attributes:
        error: a file could not be written. Kept and not raised, because the other ranks must hear of it too.

    Raises:
        ConfigError: a sink's package is not installed; on every rank, so that none waits for rank 0.
        SaveError: a file cannot be opened.
    """

    def __init__(
        self,
        run_dir: Path,
        sinks: Sequence[str],
        *,
        is_main: bool,
        console: Console | None = None,
        tracked: TrackedRun | None = None,
    ) -> None:
        for name in sinks:
            if name != "jsonl":
                check_installed(name)
        self._lines = JsonLines(run_dir / METRICS_NAME) if is_main else None
        self._board_folder = run_dir / "tensorboard" if is_main and "tensorboard" in sinks else None
        self._board: Any = None
        self._tracked = tracked if is_main else None
        self._tracker_names = [name for name in sinks if name in KINDS]
        self._trackers: list[Background] = []
        self._console = console if is_main else None
        self.error: SaveError | None = None

    def begin(self, step: int) -> None:
        """Open TensorBoard's file for the steps after ``step``; those drawn there by an earlier attempt are taken back.

        Trackers are opened, too; there, steps that are trained twice are drawn twice.

        Once at the start, and again when the run goes back to an older step.

        Raises:
            SaveError: it cannot be opened.
        """
        if self._board is not None:
            self._board.close()
        if self._board_folder is not None:
            self._board = _tensorboard(self._board_folder, first_step=step + 1 if step else 0)
        if self._tracked is not None and not self._trackers:
            self._trackers = [Background(name, self._tracked) for name in self._tracker_names]

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Record ``record`` (with its ``step``) as of now."""
        self._append({"kind": kind, "time": time.time(), **record})
        if self._board is not None or self._trackers:
            scalars = [(f"{_group(kind, record)}/{name}", value) for name, value in _scalars(record)]
            for name, value in scalars if self._board is not None else ():
                self._board.add_scalar(name, value, record["step"])
            for tracker in self._trackers:
                tracker.log(record["step"], scalars)
            self._give_up_failed()
        if self._console is not None:
            self._console.show(kind, record)

    def warn(self, message: str) -> None:
        """Say something loudly, and keep it."""
        if self._lines is not None:
            logger.warning("%s", message)
        self._append({"kind": "warning", "time": time.time(), "message": message})

    def _append(self, line: dict[str, Any]) -> None:
        if self._lines is None:
            return
        try:
            self._lines.write(line)
        except SaveError as error:
            self.error = self.error or error

    def _give_up_failed(self) -> None:
        for tracker in [one for one in self._trackers if one.failure is not None]:
            self._trackers.remove(tracker)
            self.warn(f"{tracker.name} is given up until the next start, {METRICS_NAME} has all: {tracker.failure}")

    def close(self, *, failed: bool = False) -> None:
        """Flush and close everything; ``failed``: what the trackers are told of the run."""
        for tracker in self._trackers:
            tracker.close(failed)
        self._give_up_failed()
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._console is not None:
            self._console.close()


def _tensorboard(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(log_dir=str(folder), purge_step=first_step)
    except OSError as error:
        raise save_error(folder, error) from error


def _group(kind: str, record: dict[str, Any]) -> str:
    return f"{kind}/{record['set']}" if "set" in record else kind


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    scalars: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            scalars.append((prefix + name, float(value)))
    return scalars

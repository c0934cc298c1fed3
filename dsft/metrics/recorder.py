"""Where records go: ``metrics.jsonl`` always, TensorBoard when asked for, and the console of rank 0."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsft.errors import ConfigError, SaveError
from dsft.fsio import save_error
from dsft.metrics.console import Console
from dsft.metrics.json_lines import JsonLines

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


class Recorder:
    """Writes records on rank 0; on other ranks it does nothing.

    Args:
        run_dir: folder of the run.
        sinks: ``log.sinks`` of the configuration.
        is_main: this is rank 0.
        console: shows records to a person; None: only the files.

    Attributes:
        error: a file could not be written. Kept and not raised, because the other ranks must hear of it too.

    Raises:
        ConfigError: tensorboard is asked for and not installed; on every rank, so that none waits for rank 0.
        SaveError: a file cannot be opened.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[str], *, is_main: bool, console: Console | None = None) -> None:
        if "tensorboard" in sinks:
            _require_tensorboard()
        self._lines = JsonLines(run_dir / METRICS_NAME) if is_main else None
        self._board_folder = run_dir / "tensorboard" if is_main and "tensorboard" in sinks else None
        self._board: Any = None
        self._console = console if is_main else None
        self.error: SaveError | None = None

    def begin(self, step: int) -> None:
        """Open TensorBoard's file for the steps after ``step``; those drawn there by an earlier attempt are taken back.

        Raises:
            SaveError: it cannot be opened.
        """
        if self._board_folder is not None:
            self._board = _tensorboard(self._board_folder, first_step=step + 1 if step else 0)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Record ``record`` (with its ``step``) as of now."""
        self._append({"kind": kind, "time": time.time(), **record})
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(f"{_group(kind, record)}/{name}", value, record["step"])
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

    def close(self) -> None:
        """Flush and close everything."""
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._console is not None:
            self._console.close()


def _require_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "log.sinks names tensorboard, which is not installed. Install it (pip install 'dsft[tensorboard]'), or "
            "remove it from log.sinks."
        )


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

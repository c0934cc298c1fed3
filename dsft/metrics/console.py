"""What a person sees: a progress bar and short lines on a terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

logger = logging.getLogger(__name__)


def set_up_logging(*, is_main: bool, who: str) -> None:
    """Rank 0 says everything from INFO up; another rank only warnings, with its name in front.

    One kind of warning is left out on all: torch 2.13 has new names for collectives that DeepSpeed 0.19 calls by their
    old ones, so every kind of collective would warn once a rank, of something that no user can change.
    """
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.\w+` is deprecated",
        category=FutureWarning,
        module=r"torch\.distributed\.c10d_logger",
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if is_main else f"[{who}] %(message)s"))
    root = logging.getLogger("dsft")
    root.handlers[:] = [handler]
    root.propagate = False
    handler.setLevel(logging.INFO if is_main else logging.WARNING)
    root.setLevel(logging.INFO)  # a rank's own file keeps all of it


class Console:
    """Shows records of rank 0.

    Args:
        total_steps, total_tokens: length of the run, in whichever it is given (the other is None).
    """

    def __init__(self, total_steps: int | None, total_tokens: int | None) -> None:
        self._total_steps = total_steps
        self._total_tokens = total_tokens
        self._progress: Any = None
        self._task: Any = None
        self._is_shown = False
        if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:.1f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=RichConsole(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task("training", total=total_steps or total_tokens)

    def show(self, kind: str, record: dict[str, Any]) -> None:
        """Show one record as it fits its kind."""
        if kind == "step" and self._progress is not None:
            if not self._is_shown:  # not before: what fails at the start must find the terminal as it was
                self._progress.start()
                self._is_shown = True
            done = record["step"] if self._total_steps else record["tokens_trained"]
            self._progress.update(self._task, completed=done, description=_step_line(record, self._share(record)))
            return
        line = _LINES.get(kind, _plain_line)(record, self._share(record))
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            logger.info("%s", line)

    def _share(self, record: dict[str, Any]) -> str:
        total, done = (self._total_steps, "step") if self._total_steps else (self._total_tokens, "tokens_trained")
        return f"{100 * record[done] / total:.1f} %" if total and done in record else ""

    def close(self) -> None:
        """Take the progress bar away."""
        if self._is_shown:
            self._progress.stop()


def _step_line(record: dict[str, Any], share: str) -> str:
    loss = "none" if record["loss"] is None else f"{record['loss']:.4f}"
    by_source = " ".join(f"{name} {value:.4f}" for name, value in record["loss_by_source"].items())
    useful = record["supervised_tokens_per_second"] + record["other_tokens_per_second"]
    mfu = "" if record["mfu"] is None else f" | MFU {100 * record['mfu']:.1f} %"
    return (
        f"step {record['step']} ({share}) | loss {loss} [{by_source}] | lr {record['lr']:.2e} | "
        f"grad norm {record['grad_norm']:.3g} | {useful:,.0f} tokens/s | data wait {record['data_wait_seconds']:.2f} s"
        f"{mfu}"
    )


def _evaluation_line(record: dict[str, Any], share: str) -> str:
    parts = [f"held-out {record['set']} at step {record['step']}: loss {record['loss']:.4f}"]
    if record.get("train_loss") is not None:
        parts.append(f"train loss {record['train_loss']:.4f}")
    parts.append(f"perplexity {record['perplexity']:.3f}, bits per byte {record['bits_per_byte']:.4f}")
    if record.get("f1") is not None:
        parts.append(f"exact match {record['exact_match']:.3f}, F1 {record['f1']:.3f}")
    return " | ".join(parts)


def _bias_line(record: dict[str, Any], share: str) -> str:
    low, high = record["change_interval"]
    return (
        f"bias {record['set']} ({record['test']}) at step {record['step']}: {record['value']:.3f}, change "
        f"{record['change']:+.3f} [{low:+.3f}, {high:+.3f}]"
    )


def _checkpoint_line(record: dict[str, Any], share: str) -> str:
    stall = f"training stood {record['stall_seconds']:.2f} s"
    return f"step {record['step']} saved in {record['write_seconds']:.1f} s ({stall}): {record['path']}"


def _resume_line(record: dict[str, Any], share: str) -> str:
    return f"going on after step {record['step']}: {record['path']}"


def _plain_line(record: dict[str, Any], share: str) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items())


_LINES = {
    "step": _step_line,
    "evaluation": _evaluation_line,
    "bias": _bias_line,
    "checkpoint": _checkpoint_line,
    "resume": _resume_line,
}

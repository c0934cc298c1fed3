"""The demonstration's last act: kill -9 in the middle of the run, and what the resume does with the lost steps."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dsft.demo.processes import end_processes
from dsft.errors import TrainingError

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class TwiceTrained:
    """A record of steps that were trained before the crash and, because no checkpoint had them, once more after it.

    Attributes:
        loss_before: mean loss of the steps up to ``step`` since the record before, at the first number of ranks.
        loss_after: of the same steps, on the ranks that resumed.
    """

    step: int
    loss_before: float
    loss_after: float


@dataclass(frozen=True, slots=True)
class Crash:
    """What was killed and how it went on."""

    num_ranks_before: int
    num_ranks_after: int
    killed_after_step: int
    resumed_from_step: int
    steps: tuple[TwiceTrained, ...]

    @property
    def max_relative_difference(self) -> float:
        """Of the two losses of any step; NaN if one of them is."""
        return float(np.max([abs(step.loss_after / step.loss_before - 1.0) for step in self.steps]))


def run_until_killed(command: Sequence[str], environment: dict[str, str], metrics: Path, step: int) -> None:
    """Run ``command`` and end it and all that it started with SIGKILL once ``metrics`` has a record of ``step``.

    Raises:
        TrainingError: it ended before that.
    """
    process = subprocess.Popen(command, env=environment)
    try:
        while all(record["step"] < step for record in read_steps(metrics)):
            if process.poll() is not None:
                raise TrainingError(
                    f"the training run ended with exit code {process.returncode} before step {step}; its output above "
                    "says why."
                )
            time.sleep(_POLL_SECONDS)
    finally:
        alive = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            above = psutil.Process(process.pid)
            alive = [above, *above.children(recursive=True)]
        end_processes(alive, at_once=True)
        process.wait()


def read_steps(metrics: Path) -> list[dict[str, Any]]:
    """The records of steps in a ``metrics.jsonl``, in the order of writing; without a line that is half written."""
    return [record for record in _read(metrics) if record["kind"] == "step"]


def read_crash(metrics: Path, num_ranks_before: int, num_ranks_after: int) -> Crash:
    """The steps that both starts of a run have trained.

    Raises:
        TrainingError: there are none.
    """
    records = _read(metrics)
    border = next((i for i, record in enumerate(records) if record["kind"] == "resume"), len(records))
    before, after = (
        {record["step"]: record["loss"] for record in part if record["kind"] == "step"}
        for part in (records[:border], records[border:])
    )
    both = sorted(before.keys() & after.keys())
    if not both:
        raise TrainingError(f"no step in {metrics} was trained again after the crash. Look at the output above.")
    steps = tuple(TwiceTrained(step, before[step], after[step]) for step in both)
    return Crash(num_ranks_before, num_ranks_after, max(before), int(records[border]["step"]), steps)


def _read(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_bytes().split(b"\n")[:-1] if line]

"""The starts of a run, one line each, and the steps that led to its newest checkpoint.

A run that was stopped, or crashed, and went on has several attempts; a step may have been run by more than one. What
made the weights of a checkpoint is found backwards: the attempt that saved it ran its steps from the checkpoint it
went on from, and so on to a fresh start.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsft.checkpoint.discover import load_state, newest
from dsft.errors import DataError
from dsft.metrics.json_lines import JsonLines, read_json_lines
from dsft.sampling.objectives import Objective
from dsft.store.reader import SourceStore
from dsft.train.step_log import DATA_LOG_NAME

ATTEMPTS_NAME = "attempts.jsonl"


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that an attempt went on from, and the attempt that had saved it."""

    checkpoint: Path
    attempt: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run.

    Attributes:
        id: of the attempt.
        step: steps taken before it; its first step is the next one.
        from_attempt: the attempt whose checkpoint it went on from; None for a fresh start.
        checkpoint: that checkpoint's folder.
        world_size: number of ranks.
        config: the resolved configuration, as ``dsft.config.load.config_to_json`` gives it.
        stores: per source, in the configuration's order: its token store's folder and fingerprint.
        objectives: per source: the fields of its ``Objective``; None: it predicts the next token.
    """

    id: str
    step: int
    from_attempt: str | None
    checkpoint: str | None
    world_size: int
    config: dict[str, Any]
    stores: tuple[dict[str, str], ...]
    objectives: tuple[dict[str, Any] | None, ...]

    @classmethod
    def of(
        cls,
        name: str,
        step: int,
        origin: Origin | None,
        identity: Mapping[str, Any],
        stores: Sequence[SourceStore],
        objectives: Sequence[Objective | None],
    ) -> Attempt:
        """The attempt ``name`` that begins after ``step`` steps (``identity``: what its checkpoints will carry)."""
        return cls(
            id=name,
            step=step,
            from_attempt=None if origin is None else origin.attempt,
            checkpoint=None if origin is None else str(origin.checkpoint.absolute()),
            world_size=identity["world_size"],
            config=identity["config"],
            stores=tuple({"folder": s.place, "fingerprint": s.fingerprint} for s in stores),
            objectives=tuple(None if objective is None else asdict(objective) for objective in objectives),
        )


def append_attempt(run_dir: Path, attempt: Attempt) -> None:
    """Write down that an attempt begins; on the disk before its first step. Raises SaveError."""
    lines = JsonLines(run_dir / ATTEMPTS_NAME)
    lines.write(asdict(attempt))
    lines.sync()
    lines.close()


@dataclass(frozen=True, slots=True)
class Segment:
    """The steps of a lineage that one attempt ran.

    Attributes:
        attempt: which.
        first_step, last_step: the first and the last of them (steps count from 1).
        lines: step -> the lines of the data log about it; exactly one where nothing is wrong.
    """

    attempt: Attempt
    first_step: int
    last_step: int
    lines: dict[int, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Lineage:
    """The steps that made the newest weights of a run.

    Attributes:
        segments: in the order of their steps, from step 1 on.
        checkpoint: the newest checkpoint, at which the lineage ends; None where the run has none, and then it ends with
            the last logged step.
        num_superseded: logged steps that are not of the lineage: run again by a later attempt, or after the checkpoint.
    """

    segments: tuple[Segment, ...]
    checkpoint: Path | None
    num_superseded: int


def read_lineage(run_dir: Path) -> Lineage:
    """Find the lineage of a run.

    Raises:
        DataError: the run has no log of its attempts or steps, or went on from a run whose log is gone.
        CheckpointError: the newest checkpoint cannot be read.
    """
    log = _Log(run_dir)
    checkpoint = newest(run_dir / "checkpoints")
    if checkpoint is not None:
        state = load_state(checkpoint)
        name, step = str(state["attempt"]), int(state["train"]["step"])
    elif log.last is not None:
        name, step = log.last
    else:
        raise DataError(f"{run_dir / DATA_LOG_NAME} holds no step, and there is no checkpoint: nothing was trained.")
    segments: list[Segment] = []
    where = log
    while True:
        attempt = where.attempts.get(name)
        if attempt is None:
            raise DataError(
                f"{where.path} knows no attempt {name[:8]}, so the steps up to {step} cannot be proved. It was "
                "removed, or the run began from a checkpoint of a run whose folder is gone."
            )
        if step > attempt.step:
            lines = {number: where.lines[name][number] for number in range(attempt.step + 1, step + 1)}
            segments.append(Segment(attempt, attempt.step + 1, step, lines))
        if attempt.from_attempt is None:
            break
        assert attempt.checkpoint is not None, "an attempt that goes on goes on from a checkpoint"
        name, step = attempt.from_attempt, attempt.step
        if name not in where.attempts:
            where = _Log(Path(attempt.checkpoint).parent.parent)
    used = sum(len(entries) for s in segments if s.attempt.id in log.attempts for entries in s.lines.values())
    return Lineage(tuple(reversed(segments)), checkpoint, log.num_lines - used)


class _Log:
    """What a run folder says of its attempts and their steps."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ATTEMPTS_NAME
        if not self.path.is_file():
            raise DataError(f"{self.path} is missing: {run_dir} is no run folder, or an older dsft trained it.")
        try:
            self.attempts = {entry["id"]: Attempt(**entry) for entry in read_json_lines(self.path)}
            data_log = read_json_lines(run_dir / DATA_LOG_NAME)
            self.last = (str(data_log[-1]["attempt"]), int(data_log[-1]["step"])) if data_log else None
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise DataError(f"{run_dir}: {ATTEMPTS_NAME} or {DATA_LOG_NAME} is damaged ({error!r}).") from error
        self.num_lines = len(data_log)
        self.lines: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for line in data_log:
            self.lines[line["attempt"]][line["step"]].append(line)

"""The starts of a run, one line each, and the steps that led to its newest checkpoint.

A run that was stopped, or crashed, and went on has several attempts; a step may have been run by more than one. What
made the weights of a checkpoint is found backwards: the attempt that saved it ran its steps from the checkpoint it
went on from, and so on to a fresh start.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsft.checkpoint.discover import load_state, newest
from dsft.errors import DataError
from dsft.metrics.json_lines import JsonLines, read_json_lines
from dsft.sampling.objectives import Objective
from dsft.store.reader import SourceStore
from dsft.train.growth import Before
from dsft.train.step_log import DATA_LOG_NAME

ATTEMPTS_NAME = "attempts.jsonl"


@dataclass(frozen=True, slots=True)
class Passed:
    """What an attempt passed over on purpose, between its checkpoint and its first step (``dsft.train.roll_back``).

    Attributes:
        cursor: where its first step begins in the data (``cursor_to_json``).
        tokens: document tokens of the plan up to there.
        num_roll_backs: how often the run had gone back then.
        cause: for a person.
    """

    cursor: dict[str, Any]
    tokens: int
    num_roll_backs: int
    cause: str


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that an attempt went on from, the attempt that had saved it, what is passed over after it, and the
    sources as they were then."""

    checkpoint: Path
    attempt: str
    passed: Passed | None = None
    before: Mapping[str, Before] = field(default_factory=dict)


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
        stores: per source, in the configuration's order: its token store's folder and fingerprint, the number of its
            shards, and how it had grown (``dsft.sampling.types.Growth``; the last two: since dsft lets sources grow).
        objectives: per source: the fields of its ``Objective``; None: it predicts the next token.
        passed: the data after its checkpoint that it left out; None: it left out nothing.
    """

    id: str
    step: int
    from_attempt: str | None
    checkpoint: str | None
    world_size: int
    config: dict[str, Any]
    stores: tuple[dict[str, Any], ...]
    objectives: tuple[dict[str, Any] | None, ...]
    passed: Passed | None = None

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
            stores=tuple(
                {"folder": s.place, "fingerprint": s.fingerprint, "num_shards": s.num_shards, "growth": grown}
                for s, grown in zip(stores, identity["growth"].values(), strict=True)
            ),
            objectives=tuple(None if objective is None else asdict(objective) for objective in objectives),
            passed=None if origin is None else origin.passed,
        )


def append_attempt(run_dir: Path, attempt: Attempt) -> None:
    """Write down that an attempt begins; on the disk before its first step. Raises SaveError."""
    lines = JsonLines(run_dir / ATTEMPTS_NAME)
    lines.write(asdict(attempt))
    lines.sync()
    lines.close()


def read_attempts(run_dir: Path) -> list[Attempt]:
    """The attempts of a run, in the order of their starts; none where it has no log of them.

    Raises:
        DataError: the log is damaged.
    """
    path = run_dir / ATTEMPTS_NAME
    try:
        entries = read_json_lines(path) if path.is_file() else []
        return [
            Attempt(**{**entry, "passed": Passed(**entry["passed"]) if entry.get("passed") else None})
            for entry in entries
        ]
    except (json.JSONDecodeError, TypeError) as error:
        raise DataError(f"{path} is damaged, or another version of dsft wrote it ({error!r}).") from error


def passed_after(run_dir: Path, attempt: str, step: int) -> Passed | None:
    """What the run has decided to pass over after the checkpoint that ``attempt`` saved of ``step``."""
    decided = [one.passed for one in read_attempts(run_dir) if (one.from_attempt, one.step) == (attempt, step)]
    return next((passed for passed in reversed(decided) if passed is not None), None)


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
            self.attempts = {attempt.id: attempt for attempt in read_attempts(run_dir)}
            data_log = read_json_lines(run_dir / DATA_LOG_NAME)
            self.last = (str(data_log[-1]["attempt"]), int(data_log[-1]["step"])) if data_log else None
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise DataError(f"{run_dir}: {ATTEMPTS_NAME} or {DATA_LOG_NAME} is damaged ({error!r}).") from error
        self.num_lines = len(data_log)
        self.lines: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for line in data_log:
            self.lines[line["attempt"]][line["step"]].append(line)

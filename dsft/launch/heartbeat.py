"""A rank's sign of life: one small file that it writes over once a second, and a file for its stacks.

``heartbeats/rank-00003`` holds who and where the rank is and a count of beats. A reader never compares clocks of two
hosts: it sees the count change, or not, by its own clock. A process that is stopped, or holds Python's lock, does not
beat; one that waits for ever in a collective beats, and its phase and step stand still.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from dsft.launch.progress import Progress

logger = logging.getLogger(__name__)

FOLDER_NAME = "heartbeats"
STACK_SIGNAL = signal.SIGQUIT
"""Makes a rank write the stacks of all its threads, from C, whatever Python does."""
_RECORD_BYTES = 512
_MIN_STEP_LIMIT_SECONDS = 30.0
_FIRST_STEPS_LIMIT_SECONDS = 900.0
PHASE_LIMIT_SECONDS = {"evaluate": 3600.0, "save": 1800.0}
"""Phases whose length is not known beforehand. The start has no limit (it may prepare data for hours)."""
STEP_LIMIT_MEDIANS = 5.0


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat file says.

    Attributes:
        rank, host, pid, start_time: which process (``start_time`` as psutil gives it).
        attempt: id of this start of the run.
        number: beats so far.
        phase, step: see :class:`Progress`.
        limit_seconds: how long this phase may take; None: no limit.
        phase_seconds: how long it has taken, or since it last waited for data.
    """

    rank: int
    host: str
    pid: int
    start_time: float
    attempt: str
    number: int
    phase: str
    step: int
    limit_seconds: float | None
    phase_seconds: float

    @property
    def stands_still(self) -> bool:
        """It has been in one phase of one step for longer than that takes."""
        return self.limit_seconds is not None and self.phase_seconds > self.limit_seconds


def limit_seconds(progress: Progress) -> float | None:
    """How long a rank may be where it is; None: no limit."""
    if progress.is_waiting_for_data:
        return None
    if progress.phase != "step":
        return PHASE_LIMIT_SECONDS.get(progress.phase)
    median = progress.median_step_seconds
    if median is None:
        return _FIRST_STEPS_LIMIT_SECONDS
    return max(STEP_LIMIT_MEDIANS * median, _MIN_STEP_LIMIT_SECONDS)


class Heartbeat:
    """Writes the files of one rank. They need not survive a crash, so they are written in place and not synced.

    Args:
        run_dir: the run's folder.
        rank: of this process.
        attempt: id of this start of the run.
    """

    def __init__(self, run_dir: Path, rank: int, attempt: str) -> None:
        self._path = run_dir / FOLDER_NAME / f"rank-{rank:05d}"
        self._rank, self._attempt = rank, attempt
        self._start_time = psutil.Process().create_time()
        self._number = 0
        self._descriptor: int | None = None
        self._stacks: BinaryIO | None = None
        self._dumped: tuple[str, int] | None = None

    def open(self) -> None:
        """Make the files. Without them (a full disk) the run goes on, and says that nobody can watch it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._stacks = open(self._path.with_suffix(".stack"), "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            logger.warning("no heartbeats: cannot write %s (%s)", self._path, error)
            return
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)

    def beat(self, progress: Progress) -> None:
        """Write where this rank is; its stacks too, the first time it stands still there."""
        if self._descriptor is None or self._stacks is None:
            return
        self._number += 1
        beat = Beat(
            self._rank,
            socket.gethostname(),
            os.getpid(),
            self._start_time,
            self._attempt,
            self._number,
            progress.phase,
            progress.step,
            limit_seconds(progress),
            time.monotonic() - max(progress.since, progress.data_since),
        )
        try:
            os.pwrite(self._descriptor, json.dumps(asdict(beat)).encode().ljust(_RECORD_BYTES), 0)
        except OSError as error:
            logger.warning("no more heartbeats: cannot write %s (%s)", self._path, error)
            self.close()
            return
        if beat.stands_still and self._dumped != (beat.phase, beat.step):
            self._dumped = (beat.phase, beat.step)
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def close(self) -> None:
        """Write no more."""
        faulthandler.unregister(STACK_SIGNAL)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._stacks is not None:
            self._stacks.close()
            self._stacks = None


def read_beats(run_dir: Path) -> dict[int, Beat]:
    """The last heartbeat of each rank, by rank. Files of another version are passed over."""
    beats = {}
    for path in sorted((run_dir / FOLDER_NAME).glob("rank-*")):
        if path.suffix:
            continue
        try:
            beat = Beat(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
        beats[beat.rank] = beat
    return beats


def read_stack(run_dir: Path, rank: int) -> str:
    """What a rank wrote of its stacks; empty when it wrote nothing."""
    try:
        return (run_dir / FOLDER_NAME / f"rank-{rank:05d}.stack").read_text(errors="replace")
    except OSError:
        return ""

"""Which ranks of a start hang, judged from their heartbeats by the clock of whoever looks, and what they were doing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsft.launch.heartbeat import STACK_SIGNAL, Beat, read_beats, read_stack

SILENT_SECONDS = 30.0
"""Without a beat, which comes every second. A process that swaps or is compiling may miss a few."""
SUSPECT_SECONDS = 10.0
"""As much where another rank stands still: it waits for the one that is silent, and their limits pass together."""
_STACK_SECONDS = 2.0
_MOST_STACK_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Hang:
    """A rank that makes no progress.

    Attributes:
        beat: its last sign of life.
        reason: what it fails to do.
    """

    beat: Beat
    reason: str

    def describe(self, stack: str) -> str:
        """For a person: host, rank, phase, step, stack."""
        where = f"rank {self.beat.rank} on {self.beat.host} (process {self.beat.pid})"
        shown = stack.strip()[-_MOST_STACK_CHARACTERS:] or "it wrote no stack (its host does not answer)"
        return (
            f"{where} hangs in phase {self.beat.phase} after step {self.beat.step}: {self.reason}. Its stack:\n{shown}"
        )


class Vigil:
    """Watches the heartbeats of one start of a run.

    Args:
        run_dir: the run's folder; beats that are there already are of older starts and do not count.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._old = {beat.attempt for beat in read_beats(run_dir).values()}
        self._last: dict[int, tuple[int, float]] = {}

    def beats(self) -> dict[int, Beat]:
        """The newest heartbeat of each rank of this start."""
        return {rank: beat for rank, beat in read_beats(self._run_dir).items() if beat.attempt not in self._old}

    def hung(self) -> list[Hang]:
        """Ranks that hang now: those that give no sign of life, else those that are behind in a phase that lasts."""
        beats = self.beats()
        still = [beat for beat in beats.values() if beat.stands_still]
        limit = SUSPECT_SECONDS if still else SILENT_SECONDS
        silent = [
            Hang(beat, f"no sign of life for {seconds:.0f} s")
            for beat, seconds in self._silent(beats)
            if seconds > limit and beat.phase != "end" and _may_live(beat)
        ]
        if silent:
            return silent
        first = min((beat.step for beat in still), default=0)
        return [
            Hang(beat, f"it has taken {beat.phase_seconds:.0f} s, and {beat.limit_seconds:.0f} s are the limit there")
            for beat in still
            if beat.step == first
        ]

    def _silent(self, beats: Mapping[int, Beat]) -> Iterator[tuple[Beat, float]]:
        """Each rank's newest beat, and for how many seconds there was no newer one."""
        now = time.monotonic()
        for rank, beat in beats.items():
            number, since = self._last.get(rank, (-1, now))
            if beat.number != number:
                self._last[rank] = (beat.number, now)
            else:
                yield beat, now - since

    def stacks(self, hangs: Iterable[Hang]) -> list[str]:
        """What each hung rank was doing. A stopped process writes it when it is woken; it will be killed anyway."""
        hangs = list(hangs)
        before = {hang.beat.rank: read_stack(self._run_dir, hang.beat.rank) for hang in hangs}
        for hang in hangs:
            process = local_process(hang.beat)
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(STACK_SIGNAL)
                    process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + _STACK_SECONDS
        while time.monotonic() < deadline and any(
            read_stack(self._run_dir, rank) == text for rank, text in before.items()
        ):
            time.sleep(0.1)
        return [hang.describe(read_stack(self._run_dir, hang.beat.rank)) for hang in hangs]


def local_process(beat: Beat) -> psutil.Process | None:
    """The process of a heartbeat, if it is of this host and still the same one."""
    if beat.host != socket.gethostname() or beat.pid == os.getpid():
        return None
    try:
        process = psutil.Process(beat.pid)
        return process if abs(process.create_time() - beat.start_time) < 1.0 else None
    except psutil.Error:
        return None


def _may_live(beat: Beat) -> bool:
    return beat.host != socket.gethostname() or local_process(beat) is not None

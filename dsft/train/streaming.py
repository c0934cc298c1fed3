"""Streaming training: what tokenises ahead of it, and how all ranks hear that it has ended.

Each host's local rank 0 starts one process (``dsft.train.ahead``) that tokenises what its planner says will be needed:
the group that is read and the next one. A rank that needs a shard waits until it is published in the store's folder.

Ranks wait without collectives. So what ends the waiting of one of them (a stop request, or a preparer that failed)
must end that of all: it is written into the run folder, under the name of this start, where those that wait look.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from dsft.config.load import config_to_json
from dsft.config.models import RunConfig
from dsft.corpus.prepare import Job
from dsft.errors import DataError, DsftError, StoppedEarly
from dsft.fsio import write_json
from dsft.launch.owner import RunFolder
from dsft.launch.stop import StopFlag
from dsft.world import World

logger = logging.getLogger(__name__)


class Preparer(Protocol):
    """What tokenises ahead, as those see it that wait for its shards."""

    def wish(self, source: int, job: Job, shards: Sequence[int]) -> None:
        """These shards of a source (its number) will be needed, the first ones first. Returns at once."""

    def check(self) -> None:
        """Raise what ends the waiting: StoppedEarly, or the DataError of whatever failed on any host."""


class EndNote:
    """Why the ranks of one start of a run wait no longer: a file in the run folder that all of them see.

    Args:
        run_dir: the run's folder.
        attempt: id of this start; notes of other starts do not count.
    """

    def __init__(self, run_dir: Path, attempt: str) -> None:
        self._path = run_dir / f"streaming-ended-{attempt}.json"

    def leave(self, error: BaseException) -> None:
        """Tell the others. On a full disk nobody can be told; then the error itself must do."""
        message = str(error) if isinstance(error, DsftError) else f"{type(error).__name__}: {error}"
        with suppress(DsftError):
            write_json(self._path, {"message": message, "is_stop": isinstance(error, StoppedEarly)})

    def check(self) -> None:
        """Raise what was left: StoppedEarly or DataError."""
        try:
            note = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return
        if note["is_stop"]:
            raise StoppedEarly(note["message"])
        raise DataError(note["message"])

    def remove_older(self) -> None:
        """Remove the notes of earlier starts."""
        for path in self._path.parent.glob("streaming-ended-*.json"):
            if path != self._path:
                path.unlink(missing_ok=True)


class AheadProcess:
    """The process of this host that tokenises ahead, as a rank sees it; local rank 0 starts it and says what to do.

    It is started by exec, never by fork, and reads a pipe that ends with local rank 0, however that dies: no orphan.

    Args:
        config: the run's configuration, with the model's path resolved.
        world: which rank this is.
        folder: the run folder, owned.
        stop: a request ends the waiting.
    """

    def __init__(self, config: RunConfig, world: World, folder: RunFolder, stop: StopFlag) -> None:
        self._note, self._stop = EndNote(folder.path, folder.attempt), stop
        self._process: subprocess.Popen[bytes] | None = None
        if folder.is_owner:
            self._note.remove_older()
        if world.local_rank == 0:
            self._process = _start(config, world, folder)

    def wish(self, source: int, job: Job, shards: Sequence[int]) -> None:
        """See ``Preparer``. Only local rank 0's wishes count: all ranks plan the same."""
        if self._process is not None:
            _send(self._process, {"source": source, "listing": job.listing, "shards": list(shards)})

    def check(self) -> None:
        """See ``Preparer``."""
        exit_code = None if self._process is None else self._process.poll()
        self._note.check()
        if self._stop.requested is not None:
            self._end(
                StoppedEarly(f"stopped on request ({self._stop.requested}) while it waited for data to be tokenised.")
            )
        if exit_code is not None:
            self._end(
                DataError(
                    f"the process on {socket.gethostname()} that tokenises ahead was ended with exit code {exit_code} "
                    "(a negative one is a signal; -9 often means that memory ran out). What it published is kept, and "
                    "so is the last checkpoint: go on with --resume auto."
                )
            )

    def _end(self, error: DsftError) -> None:
        self._note.leave(error)
        raise error


def _start(config: RunConfig, world: World, folder: RunFolder) -> subprocess.Popen[bytes]:
    cores = max(1, (os.cpu_count() or 1) - world.local_size)
    environment = {"RAYON_NUM_THREADS": str(cores), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "dsft.train.ahead"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    )
    first = {
        "config": config_to_json(config),
        "run_dir": str(folder.path),
        "attempt": folder.attempt,
        "is_alone": world.local_size == world.size,
        "is_main": world.rank == 0,
    }
    _send(process, first)
    return process


def _send(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    with suppress(OSError):  # it has ended; who waits for a shard will say so
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()

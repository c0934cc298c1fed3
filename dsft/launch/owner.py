"""One live owner of a run folder, and the run's state for whoever watches it.

Rank 0 holds an flock on ``owner.lock`` for as long as it lives; the kernel drops it at any death. The file says who
holds it (host, process id and its start time, attempt id), which also settles the case where there is no flock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import psutil

from dsft.dist import Groups
from dsft.errors import DsftError, LaunchError
from dsft.fsio import save_error, write_json

logger = logging.getLogger(__name__)

LOCK_NAME = "owner.lock"
STATE_NAME = "run_state.json"
_DYING_SECONDS = 3.0
"""A process that was killed keeps its lock until its last thread is gone; the storm saw a start that was faster."""
SHARED_FOLDER_SECONDS = 30.0
"""So long the hosts have to see what rank 0 has just written."""
RunStatus = Literal["running", "finished", "stopped", "failed"]


class RunFolder:
    """A run folder that this run owns until ``release`` (or its death). Made by :func:`take_run_folder`.

    Attributes:
        path: the folder.
        attempt: id of this start of the run (32 hex digits), equal on all ranks.
    """

    def __init__(self, path: Path, attempt: str, descriptor: int | None) -> None:
        self.path = path
        self.attempt = attempt
        self._descriptor = descriptor
        before = read_run_state(path) or {}  # until this start has saved, what an earlier one saved stands
        self._standing = {key: before.get(key) for key in ("checkpoint", "checkpoint_step")}
        self._writing = threading.Lock()

    @property
    def is_owner(self) -> bool:
        """True on rank 0, which holds the lock and alone writes the state."""
        return self._descriptor is not None

    def set_checkpoint(self, checkpoint: Path, step: int) -> None:
        """The newest checkpoint of the run is ``checkpoint``; the states written from now on say so."""
        self._standing = {"checkpoint": str(checkpoint.absolute()), "checkpoint_step": step}

    @property
    def checkpoint_step(self) -> int | None:
        """Step of the newest checkpoint of the run that is known; None: there is none."""
        step: int | None = self._standing["checkpoint_step"]
        return step

    def write_state(self, status: RunStatus, step: int | None, *, exit_code: int | None = None, **more: Any) -> None:
        """Write ``run_state.json`` atomically on rank 0; does nothing on the others. Any thread may call it.

        Beside what is given here it says which attempt, on which host, and what checkpoint stands. It is the truth
        about a run: launchers lose exit codes, and ``deepspeed`` ends with 0 when its node launcher is killed.

        Args:
            step: optimizer steps done; None: it failed before that was known.
            exit_code: what this process will end with; None: it runs.

        Raises:
            SaveError: it could not be written.
        """
        if not self.is_owner:
            return
        record = {"status": status, "step": step, "attempt": self.attempt, "time": time.time(), **self._standing}
        record |= {"host": socket.gethostname(), "pid": os.getpid(), "exit_code": exit_code, **more}
        with self._writing:
            write_json(self.path / STATE_NAME, record)

    def release(self) -> None:
        """Give the folder back. The lock file stays, empty, because removing it could free a newer owner's lock."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def take_run_folder(path: Path, groups: Groups) -> RunFolder:
    """Create the folder if need be and become its owner. Collective: rank 0 takes it, all ranks learn the result.

    Raises:
        LaunchError: another live run owns it, or a rank has another folder of that path; on every rank alike.
        SaveError: it cannot be made or written, on every rank alike.
    """
    attempt = uuid.uuid4().hex
    descriptor: int | None = None
    error: DsftError | None = None
    if groups.rank == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            wait_until_free(path, _DYING_SECONDS)
            descriptor = _take(path / LOCK_NAME, attempt)
        except OSError as failure:
            error = save_error(path, failure)
        except DsftError as failure:
            error = failure
    groups.agree(error)
    attempt = str(groups.broadcast_object(attempt))
    folder = RunFolder(path, attempt, descriptor)
    try:
        groups.agree(_check_shared(path, attempt))
    except DsftError:
        folder.release()
        raise
    return folder


def _check_shared(path: Path, attempt: str) -> LaunchError | None:
    """Whether this rank sees what rank 0 wrote there; a network file system may take a moment."""
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while True:
        try:
            if json.loads((path / LOCK_NAME).read_bytes())["attempt"] == attempt:
                return None
        except (OSError, ValueError, KeyError):
            pass  # not there, or not yet all of it
        if time.monotonic() > deadline:
            return LaunchError(
                f"run.dir: {path} is not shared: {socket.gethostname()} has another folder of that path, or none; what "
                f"rank 0 wrote there {SHARED_FOLDER_SECONDS:.0f} s ago is not in it. Put run.dir on storage that every "
                "host mounts at the same path."
            )
        time.sleep(0.1)


def wait_until_free(path: Path, seconds: float) -> bool:
    """Wait until no process holds the lock of a run folder; False: one still does after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            descriptor = os.open(path / LOCK_NAME, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            if _flock(descriptor) is not False:
                return True
        finally:
            os.close(descriptor)
        time.sleep(0.2)
    return False


def read_run_state(path: Path) -> dict[str, Any] | None:
    """The last written state of a run folder; None when it has none."""
    try:
        state = json.loads((path / STATE_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    assert isinstance(state, dict)
    return state


def _take(lock: Path, attempt: str) -> int:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        is_locked = _flock(descriptor)
        owner = _read_owner(descriptor)
        if is_locked is False or (owner is not None and _may_live(owner, flock_works=is_locked is True)):
            raise _owned(lock, owner)
        if owner is not None:
            logger.warning("taking over %s: its last owner, %s, is gone", lock.parent, _describe(owner))
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start_time": psutil.Process().create_time(),
            "attempt": attempt,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _flock(descriptor: int) -> bool | None:
    """True: held now; False: another process holds it; None: this file system has no flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return True


def _read_owner(descriptor: int) -> dict[str, Any] | None:
    """Who wrote the lock file last; None when it was released, or its writer died before it was written."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return {key: owner[key] for key in ("host", "pid", "start_time", "attempt")}
    except (ValueError, KeyError, TypeError):
        return None


def _may_live(owner: dict[str, Any], *, flock_works: bool) -> bool:
    if owner["host"] != socket.gethostname():
        return not flock_works  # with flock, a free lock means a dead owner; without, nothing here can tell
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["start_time"]) < 1.0)
    except psutil.NoSuchProcess:
        return False


def _describe(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']} (attempt {owner['attempt'][:8]})"


def _owned(lock: Path, owner: dict[str, Any] | None) -> LaunchError:
    who = _describe(owner) if owner is not None else "a process that has not yet written its name"
    return LaunchError(
        f"the run folder {lock.parent} is owned by another live run: {who}. Two runs in one folder would overwrite "
        "each other's checkpoints. Stop that run first, or give this one another run.dir. (If that process is "
        f"certainly dead, on a file system without locks, delete {lock}.)"
    )

"""Runs ``deepspeed``, and starts it again when the run fails or hangs.

The run itself needs none of this: every start goes on from the newest whole checkpoint, whoever makes it. What is
added is judgement (a run is finished when ``run_state.json`` says so, not when a launcher exits with 0), a look at the
heartbeats, and a thorough end: no process of one start lives when the next one begins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dsft.config.hostfile import Host
from dsft.constants import EXIT_CANNOT_SAVE, EXIT_OK, EXIT_RUN_FAILED, EXIT_STOPPED_EARLY, EXIT_USAGE
from dsft.errors import LaunchError
from dsft.fsio import write_bytes
from dsft.launch.checks import Wanted
from dsft.launch.environment import FILE_VARIABLE, environment_files, remove_secrets, travelling, write_environment
from dsft.launch.hosts import kill_remote, write_hostfile
from dsft.launch.memory import num_oom_kills, why_killed
from dsft.launch.owner import read_run_state, wait_until_free
from dsft.launch.preflight import Placement, place
from dsft.launch.rank_log import first_error
from dsft.launch.stop import StopFlag
from dsft.launch.vigil import Vigil, local_process
from dsft.launch.watch import ask_to_stop, declare_ended, standing

logger = logging.getLogger(__name__)

STOP_SECONDS = 20.0
"""What a run is given to save when this process is asked to stop; it is killed a little later, within 30 s in all."""
_KILL_AFTER_SECONDS = 26.0
_POLL_SECONDS = 0.5
_PAUSE_SECONDS = 2.0
_END_SECONDS = 120.0
"""What the launcher may take to end after the run has."""
_HOSTS_PAUSE_SECONDS = 15.0
"""Between two starts where the hosts were not ready: one that reboots needs minutes, and so many tries."""
_LOCK_SECONDS = 120.0
"""What the owner's lock of a host that is cut off may last: NFS 4 drops it after a lease of 90 s."""
_FINAL = {EXIT_OK, EXIT_USAGE, EXIT_CANNOT_SAVE, EXIT_STOPPED_EARLY}
"""Exit codes that a restart would not change."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be run.

    Attributes:
        run_dir: the run's folder.
        train_arguments: after ``dsft``: ``train run.yaml …``, without ``--resume``.
        resume: of the first start, as for ``dsft train``; later ones go on from what there is.
        num_gpus: ranks on this host; None: as many as it has devices, or as the hosts say.
        hosts: of the hostfile; empty: this host.
        max_restarts: in a row without a new checkpoint.
        min_nodes: hosts that must be left; fewer hosts than given are used when some do not answer.
        files: that every host must have, the same.
        master_addr: of rank 0; None: found out.
    """

    run_dir: Path
    train_arguments: tuple[str, ...]
    resume: str | None = None
    num_gpus: int | None = None
    hosts: tuple[Host, ...] = ()
    max_restarts: int = 3
    min_nodes: int | None = None
    files: tuple[str, ...] = ()
    master_addr: str | None = None


@dataclass(slots=True)
class Start:
    """One start of the run while it lives.

    Attributes:
        process: of ``deepspeed``.
        vigil: over its ranks.
        old_attempt: what ``run_state.json`` named before.
        placement: its hosts; None: this host, without a hostfile.
        oom_kills_before: of this host's kernel, before it began.
        seen: every process below it that was ever seen.
        hang: why it was ended, if it hung.
    """

    process: subprocess.Popen[bytes]
    vigil: Vigil
    old_attempt: str | None
    placement: Placement | None = None
    oom_kills_before: int | None = None
    seen: set[psutil.Process] = field(default_factory=set)
    hang: str | None = None


def supervise(job: Job) -> int:
    """Run a job to its end; returns the exit code (0 finished, 75 stopped on request, 74, 2 or 1 as of the run).

    Raises:
        LaunchError: there is no ``deepspeed`` command, or the hosts are not ready (also when they were at first).
    """
    try:
        return _supervise(job)
    finally:
        remove_secrets(job.run_dir)


def _supervise(job: Job) -> int:
    failures, best, resume = 0, _committed(job.run_dir), job.resume
    is_first = True
    with StopFlag() as stop:
        while True:
            try:
                start = _begin(job, resume)
            except LaunchError as error:
                failures += 1
                if is_first or failures > job.max_restarts:
                    raise
                logger.warning("%s\nIt is tried again in %.0f s", error, _HOSTS_PAUSE_SECONDS)
                if _pause(_HOSTS_PAUSE_SECONDS, stop):
                    return EXIT_STOPPED_EARLY
                continue
            is_first = False
            try:
                _wait(job, start, stop)
            finally:
                _tear_down(job, start)
            code, reason = judge(job.run_dir, start)
            step = _committed(job.run_dir)
            if stop.requested is not None and code != EXIT_OK:
                logger.warning("stopped on request (%s); %s", stop.requested, standing(step))
                return EXIT_STOPPED_EARLY
            if code in _FINAL and start.hang is None:
                logger.info("%s", reason)
                return code
            failures = 0 if step is not None and (best is None or step > best) else failures + 1
            best = step
            if failures > job.max_restarts:
                logger.error("%s; given up after %d starts without a new checkpoint", reason, failures)
                return code if code != EXIT_OK else EXIT_RUN_FAILED
            logger.warning("%s; it is started again: %s", reason, standing(step))
            resume = "if-any"
            if _pause(_PAUSE_SECONDS, stop):
                return EXIT_STOPPED_EARLY


def _pause(seconds: float, stop: StopFlag) -> bool:
    """Wait; True: a stop was asked for meanwhile."""
    deadline = time.monotonic() + seconds
    while stop.requested is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return stop.requested is not None


def command_of(job: Job, placement: Placement | None, resume: str | None) -> list[str]:
    """The plain ``deepspeed`` command of a start. What it would check or guess over ssh is known already."""
    beside = Path(sys.executable).parent / "deepspeed"
    program = str(beside) if beside.exists() else shutil.which("deepspeed")
    if program is None:
        raise LaunchError("there is no deepspeed command on the PATH. Install dsft's requirements in this environment.")
    command = [program, "--master_port", str(_free_port() if placement is None else placement.master_port)]
    if placement is not None:
        command += ["--hostfile", str(job.run_dir / "hosts.txt"), "--no_ssh_check"]
        command += ["--master_addr", placement.master_addr]
        if len(placement.hosts) == 1 and not placement.is_here:
            command.append("--force_multi")  # else it would start the ranks of that host on this one
    if job.num_gpus is not None:
        command += ["--num_gpus", str(job.num_gpus)]
    command += ["--module", "dsft", *job.train_arguments]
    return command if resume is None else [*command, "--resume", resume]


def _place(job: Job) -> tuple[Placement | None, dict[str, str]]:
    """Where this start runs, and the environment of ``deepspeed``."""
    if not job.hosts:
        return None, dict(os.environ)
    hosts = [Host(host.name, job.num_gpus or host.slots) for host in job.hosts]
    values = travelling(os.environ, environment_files(os.environ, Path.cwd(), Path.home()))
    folder = str(job.run_dir.absolute())
    wanted = Wanted(folders=[folder], files=job.files, environ=values, python=sys.executable)
    placement = place(hosts, wanted, min_nodes=job.min_nodes, master_addr=job.master_addr)
    write_hostfile(job.run_dir / "hosts.txt", placement.hosts)
    return placement, {**os.environ, FILE_VARIABLE: str(write_environment(job.run_dir, values))}


def _begin(job: Job, resume: str | None) -> Start:
    job.run_dir.mkdir(parents=True, exist_ok=True)
    placement, environ = _place(job)
    command = command_of(job, placement, resume)
    logger.info("%s", shlex.join(command))
    vigil = Vigil(job.run_dir)
    state, oom_kills = read_run_state(job.run_dir), num_oom_kills()
    # In a session of its own: Ctrl-C comes here alone and is passed on in order.
    process = subprocess.Popen(command, env=environ, start_new_session=True)
    return Start(process, vigil, None if state is None else state["attempt"], placement, oom_kills)


def _wait(job: Job, start: Start, stop: StopFlag) -> None:
    """Until the launcher has ended, the run hangs, or the time to stop is up."""
    asked_at: float | None = None
    over_at: float | None = None
    while start.process.poll() is None:
        with contextlib.suppress(psutil.Error):
            start.seen.update(psutil.Process(start.process.pid).children(recursive=True))
        if stop.requested is not None:
            asked_at = asked_at or time.monotonic()
            has_limit = stop.deadline is not None
            if has_limit and time.monotonic() - asked_at > _KILL_AFTER_SECONDS:
                return
            left = STOP_SECONDS - (time.monotonic() - asked_at)
            if left > 0 or not has_limit:
                ask_to_stop(job.run_dir, left if has_limit else None)  # again and again: the run may just be starting
        if is_over(job.run_dir, start):  # its ranks beat no more, and those of other hosts cannot be looked at
            over_at = over_at or time.monotonic()
            if time.monotonic() - over_at > _END_SECONDS:
                return
            hangs = []
        else:
            hangs = start.vigil.hung()
        if hangs:
            start.hang = "\n".join(start.vigil.stacks(hangs))
            write_bytes(job.run_dir / f"hang-{hangs[0].beat.attempt[:8]}.txt", start.hang.encode())
            return
        time.sleep(_POLL_SECONDS)


def _tear_down(job: Job, start: Start) -> None:
    """Kill whatever is left of a start. A launcher ends its ranks one after the other, and none that is stopped.

    Ranks on a host that ssh does not reach end by themselves: they see in the run folder that they have been given up.
    """
    with contextlib.suppress(psutil.Error):
        start.seen.add(psutil.Process(start.process.pid))
        start.seen.update(psutil.Process(start.process.pid).children(recursive=True))
    beats = start.vigil.beats().values()
    start.seen.update(process for process in map(local_process, beats) if process is not None)
    for process in start.seen:
        with contextlib.suppress(psutil.Error):
            process.kill()
    remote = [beat for beat in beats if beat.host != socket.gethostname()]
    if start.placement is not None and remote:
        declare_ended(job.run_dir, remote[0].attempt)
        kill_remote(remote, start.placement.names)
    psutil.wait_procs(list(start.seen), timeout=10)
    start.process.wait()
    if remote and not wait_until_free(job.run_dir, _LOCK_SECONDS):
        logger.warning("a rank on another host still owns %s; the next start may be refused", job.run_dir)


def judge(run_dir: Path, start: Start) -> tuple[int, str]:
    """The exit code of a start and why, from the run's own record; the launcher's code only where there is none.

    Why: the error of the rank that failed first, which the console has long scrolled away.
    """
    if start.hang is not None:
        return EXIT_RUN_FAILED, start.hang
    state: dict[str, Any] | None = read_run_state(run_dir)
    code = start.process.returncode
    if state is None or state["attempt"] == start.old_attempt:
        reason = f"deepspeed ended with {code} before the run began (see above)"
        return (code if code > 0 else EXIT_RUN_FAILED), _with_cause(reason, start)
    failed = first_error(run_dir, state["attempt"]) if state["status"] in ("running", "failed") else None
    if failed is not None and not failed.is_consequence:
        return EXIT_RUN_FAILED if state["status"] == "running" else int(state["exit_code"]), failed.describe()
    if state["status"] == "running":
        reason = f"the run died without a word after step {state['step']} (deepspeed ended with {code})"
        return EXIT_RUN_FAILED, _with_cause(reason, start)
    if failed is not None:
        return int(state["exit_code"]), _with_cause(failed.describe(), start)
    return int(state["exit_code"]), str(state.get("error") or f"{state['status']} after step {state['step']}")


def _with_cause(reason: str, start: Start) -> str:
    """A rank that was killed could not say why."""
    killed = why_killed(start.process.returncode, start.oom_kills_before)
    return reason if killed is None else f"{reason}. {killed}"


def is_over(run_dir: Path, start: Start) -> bool:
    """This start's own record says that it has finished, stopped or failed."""
    state = read_run_state(run_dir)
    return state is not None and state["attempt"] != start.old_attempt and state["status"] != "running"


def _committed(run_dir: Path) -> int | None:
    state = read_run_state(run_dir)
    return None if state is None else state["checkpoint_step"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

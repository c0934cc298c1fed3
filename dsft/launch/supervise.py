"""Runs ``deepspeed``, and starts it again when the run fails or hangs.

The run itself needs none of this: every start goes on from the newest whole checkpoint, whoever makes it. What is
added is judgement (a run is finished when ``run_state.json`` says so, not when a launcher exits with 0), a look at the
heartbeats, and a thorough end: no process of one start lives when the next one begins.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dsft.config.hostfile import Host
from dsft.constants import EXIT_CANNOT_SAVE, EXIT_OK, EXIT_RUN_FAILED, EXIT_STOPPED_EARLY, EXIT_USAGE
from dsft.errors import LaunchError
from dsft.fsio import write_bytes
from dsft.launch.hosts import kill_remote, reachable, write_hostfile
from dsft.launch.owner import read_run_state
from dsft.launch.stop import StopFlag
from dsft.launch.vigil import Vigil, local_process
from dsft.launch.watch import ask_to_stop, standing

logger = logging.getLogger(__name__)

STOP_SECONDS = 20.0
"""What a run is given to save when this process is asked to stop; it is killed a little later, within 30 s in all."""
_KILL_AFTER_SECONDS = 26.0
_POLL_SECONDS = 0.5
_PAUSE_SECONDS = 2.0
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
    """

    run_dir: Path
    train_arguments: tuple[str, ...]
    resume: str | None = None
    num_gpus: int | None = None
    hosts: tuple[Host, ...] = ()
    max_restarts: int = 3
    min_nodes: int | None = None


@dataclass(slots=True)
class Start:
    """One start of the run while it lives.

    Attributes:
        process: of ``deepspeed``.
        vigil: over its ranks.
        old_attempt: what ``run_state.json`` named before.
        seen: every process below it that was ever seen.
        hang: why it was ended, if it hung.
    """

    process: subprocess.Popen[bytes]
    vigil: Vigil
    old_attempt: str | None
    seen: set[psutil.Process] = field(default_factory=set)
    hang: str | None = None


def supervise(job: Job) -> int:
    """Run a job to its end; returns the exit code (0 finished, 75 stopped on request, 74, 2 or 1 as of the run).

    Raises:
        LaunchError: there is no ``deepspeed`` command, or fewer hosts than ``min_nodes`` answer.
    """
    failures, best, resume = 0, _committed(job.run_dir), job.resume
    with StopFlag() as stop:
        while True:
            hosts = usable_hosts(job)
            start = _begin(job, hosts, resume)
            try:
                _wait(job, start, stop)
            finally:
                _tear_down(start, hosts)
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
            time.sleep(_PAUSE_SECONDS)
            if stop.requested is not None:
                return EXIT_STOPPED_EARLY


def command_of(job: Job, hostfile: Path | None, resume: str | None, port: int) -> list[str]:
    """The plain ``deepspeed`` command of a start."""
    beside = Path(sys.executable).parent / "deepspeed"
    program = str(beside) if beside.exists() else shutil.which("deepspeed")
    if program is None:
        raise LaunchError("there is no deepspeed command on the PATH. Install dsft's requirements in this environment.")
    command = [program, "--master_port", str(port)]
    if hostfile is not None:
        command += ["--hostfile", str(hostfile)]
    if job.num_gpus is not None:
        command += ["--num_gpus", str(job.num_gpus)]
    command += ["--module", "dsft", *job.train_arguments]
    return command if resume is None else [*command, "--resume", resume]


def usable_hosts(job: Job) -> tuple[Host, ...]:
    """The hosts that answer, when one may be left out; else all of them."""
    if job.min_nodes is None or len(job.hosts) < 2:
        return job.hosts
    hosts = reachable(job.hosts)
    if len(hosts) < job.min_nodes:
        raise LaunchError(
            f"only {len(hosts)} of {len(job.hosts)} hosts answer over ssh, and --min-nodes asks for {job.min_nodes}: "
            f"{', '.join(host.name for host in job.hosts if host not in hosts)} do not. Repair them, or lower it."
        )
    for host in job.hosts:
        if host not in hosts:
            logger.warning("%s does not answer over ssh; this start goes on without it", host.name)
    return hosts


def _begin(job: Job, hosts: Sequence[Host], resume: str | None) -> Start:
    job.run_dir.mkdir(parents=True, exist_ok=True)
    hostfile = write_hostfile(job.run_dir / "hosts.txt", hosts) if hosts else None
    command = command_of(job, hostfile, resume, _free_port())
    logger.info("%s", shlex.join(command))
    vigil = Vigil(job.run_dir)
    state = read_run_state(job.run_dir)
    process = subprocess.Popen(command, start_new_session=True)  # Ctrl-C comes here alone and is passed on in order
    return Start(process, vigil, None if state is None else state["attempt"])


def _wait(job: Job, start: Start, stop: StopFlag) -> None:
    """Until the launcher has ended, the run hangs, or the time to stop is up."""
    asked_at: float | None = None
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
        hangs = start.vigil.hung()
        if hangs:
            start.hang = "\n".join(start.vigil.stacks(hangs))
            write_bytes(job.run_dir / f"hang-{hangs[0].beat.attempt[:8]}.txt", start.hang.encode())
            return
        time.sleep(_POLL_SECONDS)


def _tear_down(start: Start, hosts: Sequence[Host]) -> None:
    """Kill whatever is left of a start. A launcher ends its ranks one after the other, and none that is stopped."""
    with contextlib.suppress(psutil.Error):
        start.seen.add(psutil.Process(start.process.pid))
        start.seen.update(psutil.Process(start.process.pid).children(recursive=True))
    beats = start.vigil.beats().values()
    start.seen.update(process for process in map(local_process, beats) if process is not None)
    for process in start.seen:
        with contextlib.suppress(psutil.Error):
            process.kill()
    if len(hosts) > 1:
        kill_remote([beat for beat in beats if beat.host != socket.gethostname()])
    psutil.wait_procs(list(start.seen), timeout=10)
    start.process.wait()


def judge(run_dir: Path, start: Start) -> tuple[int, str]:
    """The exit code of a start and why, from the run's own record; the launcher's code only where there is none."""
    if start.hang is not None:
        return EXIT_RUN_FAILED, start.hang
    state: dict[str, Any] | None = read_run_state(run_dir)
    code = start.process.returncode
    if state is None or state["attempt"] == start.old_attempt:
        return (code if code > 0 else EXIT_RUN_FAILED), f"deepspeed ended with {code} before the run began (see above)"
    if state["status"] == "running":
        return EXIT_RUN_FAILED, f"the run died without a word after step {state['step']} (deepspeed ended with {code})"
    what = state.get("error") or f"{state['status']} after step {state['step']}"
    return int(state["exit_code"]), str(what)


def _committed(run_dir: Path) -> int | None:
    state = read_run_state(run_dir)
    return None if state is None else state["checkpoint_step"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

"""A real SLURM cluster on this machine: munged, slurmctld and three slurmd in folders and on ports of their own."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.ranks import free_port

NODES = ("0x7f000001", "0x7f000002", "0x7f000003")
"""On a cluster node names resolve; these do on every machine without a change of its hosts file, because they are the
numbers of 127.0.0.1, 127.0.0.2 and 127.0.0.3."""
_CONFIGURATION = """\
ClusterName=dsft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
BatchStartTimeout=120
MessageTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=0x7f00000[1-3] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=0x7f00000[1-3] MaxTime=INFINITE State=UP PriorityTier=2
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo", "scancel", "scontrol", "squeue")


@contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """Start the cluster; gives the variables under which srun, sbatch and their friends find it.

    Its folder has a short name: slurmd puts a socket for each step, ``<spool>/<node>_<job>.<step>``, there, and the
    name of a socket has at most 108 characters. With more no job ever starts, and slurmctld says only ``launch failed``
    (pytest's folder of a worker made it 115).
    """
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        yield from _cluster(Path(folder))


def _cluster(folder: Path, timeout_seconds: float = 60.0) -> Iterator[dict[str, str]]:
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname(),
            user=getpass.getuser(),
            controller_port=free_port(),
            nodes="\n".join(
                f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 "
                "RealMemory=1000"
                for name in NODES
            ),
        )
    )
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environ = {"SLURM_CONF": str(configuration)}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(_daemon(command, folder / f"{name}.log", environ))
            for name, command in {
                "munged": munged,
                "slurmctld": ["slurmctld", "-D", "-c", "-f", str(configuration)],
                **{f"slurmd-{name}": ["slurmd", "-D", "-f", str(configuration), "-N", name] for name in NODES},
            }.items()
        ]
        deadline = time.monotonic() + timeout_seconds
        # Idle is not ready: a job that came at once, on a busy machine, ended with JobLaunchFailure.
        while not (_are_idle(environ) and _run_a_job(environ) and _are_idle(environ)):
            logs = [log.read_text(errors="replace")[-2000:] for log in sorted(folder.glob("*.log"))]
            assert all(daemon.poll() is None for daemon in daemons), logs
            assert time.monotonic() < deadline, logs
            time.sleep(0.2)
        try:
            yield environ
        finally:
            ask(["scancel", "--signal=KILL", f"--user={getpass.getuser()}"], environ)
            deadline = time.monotonic() + 20
            while ask(["squeue", "-h"], environ) and time.monotonic() < deadline:
                time.sleep(0.2)


def _are_idle(environ: dict[str, str]) -> bool:
    return ask(["sinfo", "-h", "-p", "all", "-o", "%D %T"], environ) == f"{len(NODES)} idle"


def _run_a_job(environ: dict[str, str]) -> bool:
    said = ask(["srun", "--partition=all", f"--nodes={len(NODES)}", "echo", "here"], environ)
    return said.split() == ["here"] * len(NODES)


@contextmanager
def _daemon(command: list[str], log: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environ})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(command: list[str], environ: dict[str, str]) -> str:
    """What one of SLURM's programs prints."""
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env={**os.environ, **environ}
    )
    return answer.stdout.strip()

"""Which processes above a rank are its launcher, and that their death is seen."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest

from dsft.launch.ancestors import Ancestor, Launcher, launcher_name

NODE_LAUNCHER = ("python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("/opt/venv/bin/python3.11", "/opt/venv/bin/deepspeed", "--num_gpus", "2", "x.py"), "deepspeed"),
        (NODE_LAUNCHER, "deepspeed.launcher.launch"),
        (("python", "-m", "deepspeed.launcher.runner", "x.py"), "deepspeed.launcher.runner"),
        (("python", "/opt/bin/torchrun", "x.py"), "torchrun"),
        (("python3", "-m", "torch.distributed.run", "x.py"), "torch.distributed.run"),
        (("mpirun", "-np", "2", "python", "x.py"), "mpirun"),
        (("slurmstepd:", "[12.0]"), "slurmstepd"),
        (("python", "/opt/bin/dsft", "launch", "run.yaml"), "dsft launch"),
        (("python", "-m", "dsft", "launch", "run.yaml"), "dsft launch"),
        (("python", "-m", "dsft", "demo"), None),
        (("bash", "-c", "deepspeed --num_gpus 2 x.py"), None),
        (("nohup", "deepspeed"), None),
        (("vim", "deepspeed"), None),
        (("python", "-c", "import deepspeed"), None),
        (("python", "train.py", "deepspeed"), None),
        (("python",), None),
    ],
)
def test_a_launcher_is_known_by_its_program_alone(command: tuple[str, ...], name: str | None) -> None:
    assert launcher_name(command) == name


@pytest.fixture
def sleeping() -> Iterator[list[psutil.Process]]:
    """Processes that do nothing."""
    with ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen(["sleep", "300"])) for _ in range(5)]
        yield [psutil.Process(process.pid) for process in started]
        for process in started:
            process.kill()


def test_a_rank_whose_node_launcher_had_died_before_is_an_orphan() -> None:
    adopted_by = [Ancestor(psutil.Process(1), ("/sbin/init",))]
    assert Launcher(adopted_by).lost() is None, "started by hand, or as a service"
    assert Launcher(adopted_by, is_deepspeed=True).lost() is not None


def _launcher(processes: list[psutil.Process], *commands: tuple[str, ...]) -> Launcher:
    return Launcher([Ancestor(process, command) for process, command in zip(processes, commands, strict=False)])


def test_the_death_of_any_process_up_to_the_launcher_counts_and_none_above(sleeping: list[psutil.Process]) -> None:
    commands = (NODE_LAUNCHER, ("python", "/bin/deepspeed"), ("bash", "job.sh"), ("slurmstepd:", "[1.0]"), ("-bash",))
    launcher = _launcher(sleeping, *commands)
    assert launcher.lost() is None
    sleeping[4].kill()  # somebody logged out
    time.sleep(0.1)
    assert launcher.lost() is None
    sleeping[1].kill()
    time.sleep(0.1)
    assert launcher.lost() == f"deepspeed (process {sleeping[1].pid})"  # a zombie, which psutil still finds


def test_a_remote_node_launcher_lives_as_long_as_its_connection(sleeping: list[psutil.Process]) -> None:
    launcher = _launcher(sleeping, NODE_LAUNCHER, ("bash", "-c", "cd x; python -m"), ("sshd: user@notty",))
    assert launcher.lost() is None
    sleeping[2].kill()
    time.sleep(0.1)
    assert launcher.lost() == f"sshd: user@notty (process {sleeping[2].pid})"


def test_without_a_launcher_nobody_is_watched(sleeping: list[psutil.Process]) -> None:
    launcher = _launcher(sleeping, ("-bash",), ("sshd: user@pts/0",))
    sleeping[0].kill()
    time.sleep(0.1)
    assert launcher.lost() is None
    assert Launcher.find().lost() is None


def test_a_node_launcher_whose_runner_had_died_before_is_an_orphan() -> None:
    """What a rank finds that was still importing when ``deepspeed`` was killed."""
    script = "import subprocess, sys; subprocess.Popen(['sleep', '300'], stdout=subprocess.DEVNULL); sys.exit()"
    subprocess.run([sys.executable, "-c", script], check=True)
    orphans = [p for p in psutil.process_iter(["ppid", "cmdline"]) if p.info["cmdline"] == ["sleep", "300"]]
    orphan = next(process for process in orphans if process.info["ppid"] == 1)
    try:
        lost = _launcher([orphan], NODE_LAUNCHER).lost()
        assert lost is not None
        assert "before this rank started" in lost
    finally:
        orphan.kill()

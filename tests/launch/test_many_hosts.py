"""A run on two hosts, then on three, of which one is cut off; it goes on on the others, and the cable heals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsft.launch.heartbeat import Beat, read_beats
from dsft.launch.owner import read_run_state
from dsft.launch.watch import ask_to_stop
from tests.support.launch import exit_code, launched
from tests.support.namespaces import Network, network
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import records, write_tiny_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
LIMIT_SECONDS = 600.0
NUM_STEPS = 40
OPTIONS = [f"train.steps={NUM_STEPS}", "checkpoint.every_steps=5", "checkpoint.keep_last=2"]
ODD = 'it\'s "50 %h" of $HOME \\ `date`'
TOKEN = "hf_which_no_log_may_show"


def until(true: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.01)


def losses(run_dir: Path) -> list[float]:
    """Of each step, as it was trained last, and the held-out loss at the end."""
    last = {record["step"]: record["loss"] for record in records(run_dir, "step")}
    assert sorted(last) == list(range(1, NUM_STEPS + 1))
    return [last[step] for step in sorted(last)] + [records(run_dir, "evaluation")[-1]["loss"]]


def checkpoint_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, by the record of the run."""
    return int((read_run_state(run_dir) or {}).get("checkpoint_step") or 0)


def words(run_dir: Path) -> list[str]:
    return [word for setting in (*OPTIONS, f"run.dir={run_dir}") for word in ("--set", setting)]


def variables(hosts: Network, beat: Beat) -> dict[str, str]:
    """The environment of a rank."""
    text = hosts[beat.host].ask("cat", f"/proc/{beat.pid}/environ")
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def by_hand(hosts: Network, folder: Path, run_dir: Path, log: Path) -> int:
    """Train some steps by the plain ``deepspeed`` on two hosts, started on one of them; the step it was stopped at."""
    (folder / "two.txt").write_text("node-a slots=2\nnode-b slots=1\n")
    command = [
        str(BIN / "deepspeed"),
        "--hostfile",
        "two.txt",
        "--module",
        "dsft",
        "train",
        "run.yaml",
        *words(run_dir),
    ]
    with launched(hosts["node-a"].command(command, folder), log, {"PYTHONPATH": str(REPOSITORY)}) as process:
        until(lambda: records(run_dir, "step") or process.poll() is not None, log)
        ask_to_stop(run_dir, None)
        until(lambda: process.poll() is not None, log)
        assert process.returncode == 75, log.read_text()[-6000:]
    assert sorted(beat.host for beat in read_beats(run_dir).values()) == ["node-a", "node-a", "node-b"]
    state = read_run_state(run_dir)
    assert state is not None
    assert state["step"] == state["checkpoint_step"]
    return int(state["step"])


def test_hosts_that_change_and_one_that_is_cut_off(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    alone, run_dir, log = tmp_path / "runs" / "alone", tmp_path / "runs" / "hosts", tmp_path / "hosts.log"
    environ = {"PYTHONPATH": str(REPOSITORY)}
    names = ("node-a", "node-b", "node-c")
    (tmp_path / "hosts.txt").write_text("".join(f"{name} slots=1\n" for name in names))
    command = [str(BIN / "dsft"), "launch", "--hostfile", "hosts.txt", "--min-nodes", "2", "--resume", "auto"]
    command += ["run.yaml", *words(run_dir)]
    (tmp_path / "net").mkdir()
    with network(tmp_path / "net", names) as hosts:
        stopped_at = by_hand(hosts, tmp_path, run_dir, tmp_path / "two.log")
        there = {**environ, "WANDB_NOTES": ODD, "HF_TOKEN": TOKEN}
        with launched(hosts["node-c"].command(command, tmp_path), log, there) as process:
            until(lambda: checkpoint_step(run_dir) > stopped_at or process.poll() is not None, log)
            hosts.set_link("node-a", "down")  # with rank 0, which owns the run folder and goes on seeing it
            beats = read_beats(run_dir)
            assert [beats[rank].host for rank in sorted(beats)] == list(names), log.read_text()[-6000:]
            for beat in beats.values():  # what only the process that was started on node-c had
                found = variables(hosts, beat)
                assert (found["WANDB_NOTES"], found["DS_ACCELERATOR"]) == (ODD, "cpu")
            first = beats[0]
            until(lambda: (read_run_state(run_dir) or {})["host"] == "node-b", log)
            assert f"/proc/{first.pid}\n" not in hosts["node-a"].ask("sh", "-c", "ls -d /proc/[0-9]*"), (
                "rank 0 lives on"
            )
            hosts.set_link("node-a", "up")
            until(lambda: process.poll() is not None, log)
            assert process.returncode == 0, log.read_text()[-6000:]
    said = log.read_text()
    assert "without node-a, which does not answer" in said
    assert said.count("it is started again") == 1, said[-6000:]
    assert "--master_addr 10.77.0.1 " in said
    assert "--master_addr 10.77.0.2 " in said
    assert TOKEN not in said
    assert not (run_dir / "secrets.env").exists()
    state = read_run_state(run_dir)
    assert state is not None
    assert (state["status"], state["host"]) == ("finished", "node-b")
    resumes = [record["step"] for record in records(run_dir, "resume")]
    assert resumes[0] == stopped_at < resumes[1]

    command = [sys.executable, "-m", "dsft", "train", "run.yaml", *words(alone)]
    assert exit_code(command, tmp_path / "alone.log", environ, LIMIT_SECONDS) == 0, (tmp_path / "alone.log").read_text()
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5)

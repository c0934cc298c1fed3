"""A run on three hosts, each with its own network and sshd: one is cut off, the run goes on, and the cable heals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsft.launch.heartbeat import Beat, read_beats
from dsft.launch.owner import read_run_state
from tests.support.launch import exit_code, launched
from tests.support.namespaces import Network, network
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import records, write_tiny_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
LIMIT_SECONDS = 300.0
NUM_STEPS = 60
OPTIONS = [f"train.steps={NUM_STEPS}", "checkpoint.every_steps=10", "checkpoint.keep_last=2"]
ODD = 'it\'s "50 %h" of $HOME \\ `date`'
TOKEN = "hf_which_no_log_may_show"


def until(true: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.05)


def losses(run_dir: Path) -> list[float]:
    """Of each step, as it was trained last, and the held-out loss at the end."""
    last = {record["step"]: record["loss"] for record in records(run_dir, "step")}
    assert sorted(last) == list(range(1, NUM_STEPS + 1))
    return [last[step] for step in sorted(last)] + [records(run_dir, "evaluation")[-1]["loss"]]


def words(run_dir: Path) -> list[str]:
    return [word for setting in (*OPTIONS, f"run.dir={run_dir}") for word in ("--set", setting)]


def variables(hosts: Network, beat: Beat) -> dict[str, str]:
    """The environment of a rank."""
    text = hosts[beat.host].ask("cat", f"/proc/{beat.pid}/environ")
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def test_a_run_goes_on_without_a_host_that_is_cut_off_and_has_one_owner_when_the_cable_heals(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    alone, run_dir, log = tmp_path / "runs" / "alone", tmp_path / "runs" / "hosts", tmp_path / "hosts.log"
    environ = {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "dsft", "train", "run.yaml", *words(alone)]
    assert exit_code(command, tmp_path / "alone.log", environ, LIMIT_SECONDS) == 0, (tmp_path / "alone.log").read_text()

    names = ("node-a", "node-b", "node-c")
    (tmp_path / "hosts.txt").write_text("".join(f"{name} slots=1\n" for name in names))
    command = [str(BIN / "dsft"), "launch", "--hostfile", "hosts.txt", "--min-nodes", "2", "run.yaml", *words(run_dir)]
    environ |= {"WANDB_NOTES": ODD, "HF_TOKEN": TOKEN}
    (tmp_path / "net").mkdir()
    with (
        network(tmp_path / "net", names) as hosts,
        launched(hosts["node-c"].command(command, tmp_path), log, environ) as process,
    ):
        until(lambda: len(records(run_dir, "step")) > 12 or process.poll() is not None, log)
        beats = read_beats(run_dir)
        assert [beats[rank].host for rank in sorted(beats)] == list(names), log.read_text()[-6000:]
        for beat in beats.values():  # what only the process that was started on node-c had
            there = variables(hosts, beat)
            assert (there["WANDB_NOTES"], there["DS_ACCELERATOR"]) == (ODD, "cpu")
        first = beats[0]

        hosts.set_link("node-a", "down")  # with rank 0, which owns the run folder and goes on seeing it
        until(lambda: (read_run_state(run_dir) or {})["host"] == "node-b", log)
        assert f"/proc/{first.pid}\n" not in hosts["node-a"].ask("sh", "-c", "ls -d /proc/[0-9]*"), "its rank lives on"
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
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5)

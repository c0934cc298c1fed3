"""``dsft launch`` and bare ``deepspeed``, for real: hung and killed ranks, stop requests, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsft.checkpoint.discover import newest
from dsft.launch.heartbeat import read_beats
from dsft.launch.supervise import Start, is_over, judge
from dsft.launch.vigil import Vigil
from tests.support.launch import launched
from tests.support.ranks import free_port
from tests.support.tiny_run import records, write_tiny_run

BIN = Path(sys.executable).parent
LIMIT_SECONDS = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervise")
    write_tiny_run(folder)
    return folder


def until(true: Callable[[], object], log: Path, seconds: float = LIMIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def options(run_dir: Path, steps: int = 1_000_000) -> list[str]:
    settings = (f"run.dir={run_dir}", f"train.steps={steps}", "checkpoint.every_steps=20", "checkpoint.keep_last=2")
    return [word for setting in settings for word in ("--set", setting)]


def state(run_dir: Path) -> dict[str, Any]:
    value = json.loads((run_dir / "run_state.json").read_text())
    assert isinstance(value, dict)
    return value


def steps_taken(run_dir: Path) -> int:
    steps = records(run_dir, "step")
    return int(steps[-1]["step"]) if steps else 0


def attempts(run_dir: Path) -> int:
    path = run_dir / "attempts.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def ranks(run_dir: Path) -> list[psutil.Process]:
    found = []
    for _, beat in sorted(read_beats(run_dir).items()):
        try:
            process = psutil.Process(beat.pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_a_hung_rank_and_a_killed_one_are_survived_and_sigterm_ends_in_a_checkpoint(folder: Path) -> None:
    run_dir, log = folder / "runs" / "supervised", folder / "supervised.log"
    command = [str(BIN / "dsft"), "launch", "run.yaml", "--num_gpus", "2", *options(run_dir)]
    with launched(command, log, {}) as process:
        until(lambda: newest(run_dir / "checkpoints"), log)
        hung = ranks(run_dir)[1]
        hung.suspend()
        until(lambda: list(run_dir.glob("hang-*.txt")), log, 60.0)
        until(lambda: attempts(run_dir) == 2, log)
        assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE
        (report,) = run_dir.glob("hang-*.txt")
        assert f"rank 1 on {os.uname().nodename} (process {hung.pid}) hangs in phase " in report.read_text()
        assert "no sign of life" in report.read_text()
        assert 'File "' in report.read_text(), "its stack"

        before = steps_taken(run_dir)
        until(lambda: steps_taken(run_dir) > before + 20, log)
        ranks(run_dir)[0].kill()
        until(lambda: attempts(run_dir) == 3, log)
        before = steps_taken(run_dir)
        until(lambda: steps_taken(run_dir) > before + 5, log)

        process.send_signal(signal.SIGTERM)
        assert process.wait(30.0) == 75, log.read_text()[-4000:]
        assert ranks(run_dir) == []
    text = log.read_text()
    assert "deepspeed --master_port" in text
    assert text.count("it is started again") == 2
    last = state(run_dir)
    assert (last["status"], last["exit_code"], last["checkpoint_step"]) == ("stopped", 75, last["step"])
    checkpoint = newest(run_dir / "checkpoints")
    assert checkpoint is not None
    assert str(checkpoint) == last["checkpoint"]
    assert f"the checkpoint of step {last['step']} stands" in text


@pytest.mark.launch
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_bare_deepspeed_that_is_ended_leaves_no_rank_and_a_whole_state(folder: Path, number: signal.Signals) -> None:
    run_dir, log = folder / "runs" / f"bare-{number.name}", folder / f"bare-{number.name}.log"
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module", "dsft"]
    with launched([*command, "train", "run.yaml", *options(run_dir)], log, {}) as process:
        until(lambda: steps_taken(run_dir) > 3, log)
        left = ranks(run_dir)
        assert len(left) == 2
        process.send_signal(number)
        process.wait()
        _, alive = psutil.wait_procs(left, timeout=30.0)
        assert alive == [], log.read_text()[-4000:]
    last = state(run_dir)
    assert (last["status"], last["exit_code"], last["checkpoint_step"]) == ("stopped", 75, last["step"])
    # Each rank looks once a second, and the first one that sees it stops all.
    assert last["reason"].startswith(("its launcher is gone: deepspeed (process ", "another rank was asked to stop"))


@pytest.mark.launch
def test_a_run_that_cannot_work_is_not_started_again(folder: Path) -> None:
    run_dir, log = folder / "runs" / "wrong", folder / "wrong.log"
    wrong = ["--set", "run.world_size=7"]
    command = [str(BIN / "dsft"), "launch", "run.yaml", "--num_gpus", "1", *options(run_dir), *wrong]
    with launched(command, log, {}) as process:
        assert process.wait(LIMIT_SECONDS) == 2
    assert "started again" not in log.read_text()


@pytest.mark.launch
def test_a_finished_run_is_one_whose_record_says_so(folder: Path) -> None:
    run_dir, log = folder / "runs" / "finished", folder / "finished.log"
    command = [str(BIN / "dsft"), "launch", "run.yaml", "--num_gpus", "1", *options(run_dir, steps=4)]
    with launched(command, log, {}) as process:
        assert process.wait(LIMIT_SECONDS) == 0, log.read_text()[-4000:]
    assert state(run_dir)["status"] == "finished"


@pytest.mark.parametrize(
    ("record", "launcher_code", "expected"),
    [
        (None, 0, 1),  # deepspeed exits with 0 when its node launcher is killed
        (None, 2, 2),
        ({"status": "finished", "exit_code": 0, "attempt": "old"}, 0, 1),
        ({"status": "running", "exit_code": None}, 0, 1),
        ({"status": "finished", "exit_code": 0}, -9, 0),
        ({"status": "stopped", "exit_code": 75}, 1, 75),
        ({"status": "failed", "exit_code": 74, "error": "disk full"}, 1, 74),
    ],
)
def test_the_run_is_judged_by_its_own_record(
    tmp_path: Path, record: dict[str, Any] | None, launcher_code: int, expected: int
) -> None:
    if record is not None:
        (tmp_path / "run_state.json").write_text(json.dumps({"attempt": "new", "step": 3, **record}))
    process = subprocess.Popen(["sh", "-c", "kill -9 $$" if launcher_code < 0 else f"exit {launcher_code}"])
    process.wait()
    assert process.returncode == launcher_code
    start = Start(process, Vigil(tmp_path), "old")
    assert judge(tmp_path, start)[0] == expected
    over = record is not None and record["status"] != "running" and record.get("attempt") != "old"
    assert is_over(tmp_path, start) == over

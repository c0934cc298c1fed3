from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsft.demo.crash import TwiceTrained, read_crash, run_until_killed
from dsft.errors import TrainingError

WRITER = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
for step in range(1, 1000):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"kind": "step", "step": step, "loss": 1.0, "pid": child.pid}) + "\\n")
    time.sleep(0.02)
"""


def test_everything_is_killed_after_the_step(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    run_until_killed([sys.executable, "-c", WRITER, str(metrics)], dict(os.environ), metrics, 5)
    lines = metrics.read_text().splitlines()
    time.sleep(0.2)
    assert metrics.read_text().splitlines() == lines
    assert 5 <= len(lines) < 999
    pid = json.loads(lines[0])["pid"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_run_that_ends_before_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="exit code 7 before step 5"):
        run_until_killed([sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ), tmp_path / "m", 5)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def step(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss}


def test_steps_of_both_starts_are_paired(tmp_path: Path) -> None:
    records = [step(5, 3.0), step(10, 2.0), step(15, 1.5), {"kind": "resume", "step": 5}, step(10, 2.5), step(15, 1.5)]
    crash = read_crash(write(tmp_path / "m", *records, step(20, 1.0)), 2, 1)
    assert (crash.killed_after_step, crash.resumed_from_step) == (15, 5)
    assert crash.steps == (TwiceTrained(10, 2.0, 2.5), TwiceTrained(15, 1.5, 1.5))
    assert crash.max_relative_difference == pytest.approx(0.25)


@pytest.mark.parametrize("second", [[], [{"kind": "resume", "step": 10}, step(15, 1.0)]])
def test_no_step_trained_again_is_an_error(tmp_path: Path, second: list[dict[str, Any]]) -> None:
    with pytest.raises(TrainingError, match="trained again"):
        read_crash(write(tmp_path / "m", step(5, 3.0), step(10, 2.0), *second), 2, 1)

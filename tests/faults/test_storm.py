"""The short form of the storm: a few faults of each kind, one of them under the real launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import REPOSITORY

NUM_FAULTS = 5
pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]


def test_after_kills_at_any_moment_the_run_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.storm", "--faults", str(NUM_FAULTS), "--launcher-share", "0.1"]
    done = subprocess.run(
        [*command, "--state", str(tmp_path / "storm.json")], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["faults"] >= NUM_FAULTS
    assert shown["runs"] >= 1
    assert shown["bit_equal_runs"] == shown["proved_runs"] == shown["runs"]
    assert shown["max_difference"] == 0.0

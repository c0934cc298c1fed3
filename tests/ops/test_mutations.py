"""The tests of the operations notice every line that is broken in mutations.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_mutation_is_noticed() -> None:
    command = [sys.executable, "-m", "tests.ops.mutations"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "mutations noticed" in done.stdout

"""The same program under deepspeed, torchrun, mpirun and alone finds the same world."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import REPOSITORY, free_port

PROGRAM = str(REPOSITORY / "tests" / "support" / "hello_rank.py")
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", PROGRAM],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "PORT", PROGRAM],
    "openmpi": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, PROGRAM],
    "alone": [sys.executable, PROGRAM],
}
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_under(launcher: str, folder: Path, timeout_seconds: float = 200.0) -> list[dict[str, Any]]:
    """Start PROGRAM, kill its whole session at the limit, and read what every rank wrote."""
    environ = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [str(free_port()) if word == "PORT" else word for word in LAUNCHERS[launcher]]
    log = folder / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, str(folder)], env=environ, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(timeout_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the session that we started, with its ranks
    assert code == 0, log.read_text()
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.mark.timeout(260)
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("deepspeed", marks=pytest.mark.launch),
        pytest.param("torchrun", marks=pytest.mark.launch),
        pytest.param("openmpi", marks=pytest.mark.cluster),
        pytest.param("alone", marks=pytest.mark.launch),
    ],
)
def test_every_launcher_gives_one_world(tmp_path: Path, launcher: str) -> None:
    if shutil.which(LAUNCHERS[launcher][0]) is None:
        assert "CI" not in os.environ, f"{LAUNCHERS[launcher][0]} is not installed"
        pytest.skip(f"{LAUNCHERS[launcher][0]} is not installed")
    ranks = run_under(launcher, tmp_path)
    size = 1 if launcher == "alone" else 2
    assert [rank["rank"] for rank in ranks] == list(range(size))
    for number, rank in enumerate(ranks):
        assert (rank["size"], rank["local_rank"], rank["local_size"], rank["node"]) == (size, number, size, 0)
        assert rank["sum"] == size * (size + 1) / 2  # one group, not a run of one rank each
        assert rank["launcher"] == launcher
        assert len(set(rank["pids"])) == size
        assert rank["master_addr"] == ranks[0]["master_addr"]
        assert rank["master_port"] == ranks[0]["master_port"]

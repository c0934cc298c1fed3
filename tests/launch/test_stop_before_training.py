"""Ctrl-C while the data is prepared: one is enough, it is said, and the next start goes on."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.support.launch import launched
from tests.support.tiny_run import write_tiny_run

pytestmark = [pytest.mark.launch, pytest.mark.timeout(200)]


def test_one_interrupt_ends_a_preparation(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    line = json.dumps({"text": " ".join(topics.values())}) + "\n"
    (tmp_path / "topics-2.jsonl").write_text(line * 400)  # some 200 MB: minutes of work
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "dsft", "train", "run.yaml"]
    with launched(command, log, {}) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("shard-000001.index")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 75, log.read_text()
    assert "stopped on request (SIGINT) while the data was prepared" in log.read_text()
    assert "Traceback" not in log.read_text()
    (state,) = tmp_path.rglob("run_state.json")
    assert (json.loads(state.read_text())["status"], json.loads(state.read_text())["exit_code"]) == ("stopped", 75)

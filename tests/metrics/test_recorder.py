"""Records reach the disk line by line, also after a crash; every sink and the console show them."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dsft.errors import ConfigError, SaveError
from dsft.metrics.console import Console
from dsft.metrics.json_lines import JsonLines, read_json_lines
from dsft.metrics.recorder import METRICS_NAME, Recorder

STEP: dict[str, Any] = {
    "step": 3,
    "tokens_trained": 300,
    "loss": 2.5,
    "loss_by_source": {"papers": 2.25, "qa": 3.0},
    "lr": 1e-4,
    "grad_norm": float("inf"),
    "supervised_tokens_per_second": 1000.0,
    "other_tokens_per_second": 200.0,
    "data_wait_seconds": 0.01,
    "mfu": None,
}


def test_each_record_is_one_line_that_json_can_read(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ["jsonl"], is_main=True)
    recorder.write("step", STEP)
    recorder.warn("held-out loss rises")
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()  # before close: every line is flushed
    first = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {key: first[key] for key in ("kind", "step", "loss", "grad_norm")} == {
        "kind": "step", "step": 3, "loss": 2.5, "grad_norm": None,
    }  # fmt: skip
    assert first["time"] > 1.7e9
    assert json.loads(lines[1])["message"] == "held-out loss rises"
    recorder.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ["jsonl"], is_main=False)
    recorder.write("step", STEP)
    recorder.warn("nobody hears this")
    recorder.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("half", [b'{"step": 2, "loss": ', b'{"step": 2}', b"x" * 3_000_000])
def test_a_half_line_of_a_crash_is_cut_off(tmp_path: Path, half: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n' + half if len(half) < 1000 else half)
    with caplog.at_level(logging.WARNING, logger="dsft"):
        lines = JsonLines(path)
    lines.write({"step": 3})
    lines.close()
    assert "half a line" in caplog.text
    assert [record["step"] for record in read_json_lines(path)][-1:] == [3]
    if len(half) < 1000:
        assert [record["step"] for record in read_json_lines(path)] == [1, 3]


def test_lines_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    child = os.fork()
    if child == 0:
        lines = JsonLines(path)
        for step in range(100):
            lines.write({"step": step})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [record["step"] for record in read_json_lines(path)] == list(range(100))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_save_error_for_all_ranks_to_hear(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    recorder = Recorder(tmp_path, ["jsonl"], is_main=True)
    recorder.write("step", STEP)
    assert isinstance(recorder.error, SaveError)
    assert "metrics.jsonl" in str(recorder.error)
    assert "no space left" in str(recorder.error)


@pytest.mark.parametrize("is_main", [True, False])
def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_main: bool) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else real(name, *a))
    with pytest.raises(ConfigError, match=r"dsft\[tensorboard\]"):
        Recorder(tmp_path, ["jsonl", "tensorboard"], is_main=is_main)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="an extra")
def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder(tmp_path, ["tensorboard"], is_main=True)
    recorder.begin(0)
    recorder.write("step", STEP)
    recorder.write("evaluation", {"step": 3, "set": "held", "loss": 2.0})
    recorder.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Scalars("step/loss_by_source/papers")
    assert (event.step, event.value) == (3, 2.25)
    (event,) = board.Scalars("evaluation/held/loss")
    assert (event.step, event.value) == (3, 2.0)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="an extra")
def test_a_resume_takes_back_what_tensorboard_was_shown_after_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, steps, loss in ((0, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 2.0)):
        recorder = Recorder(tmp_path, ["tensorboard"], is_main=True)
        recorder.begin(begin)
        for step in steps:
            recorder.write("step", {**STEP, "step": step, "loss": loss})
        recorder.close()
        time.sleep(1.1)  # the file's name has the second, and files are read in the order of their names
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("step/loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_plain_lines_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(total_steps=None, total_tokens=600)
    with caplog.at_level(logging.INFO, logger="dsft"):
        console.show("step", STEP)
        console.show("evaluation", {"step": 3, "set": "held", "loss": 2.0, "perplexity": 7.389, "bits_per_byte": 1.1})
        console.show("checkpoint", {"step": 3, "path": "runs/x", "stall_seconds": 0.123, "write_seconds": 1.2345})
        console.show("resume", {"step": 3, "path": "runs/x", "from_attempt": "f" * 32})
    console.close()
    step, evaluation, checkpoint, resume = caplog.messages
    assert "step 3 (50.0 %)" in step
    assert "papers 2.2500" in step
    assert "1,200 tokens/s" in step
    assert "held-out held at step 3: loss 2.0000" in evaluation
    assert checkpoint == "step 3 saved in 1.2 s (training stood 0.12 s): runs/x"
    assert resume == "going on after step 3: runs/x"

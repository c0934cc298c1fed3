"""``data.streaming`` end to end: two ranks, and the process that tokenises ahead of them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest

from dsft.checkpoint.discover import newest
from dsft.checkpoint.manifest import step_of
from dsft.cli.main import run as run_cli
from dsft.constants import EXIT_OK, EXIT_USAGE
from dsft.train.verify_run import verify_run
from tests.support.launch import exit_code, launched
from tests.support.ranks import free_port
from tests.support.tiny_run import write_tiny_run

NUM_SHARDS = 150
AHEAD = "dsft.train.ahead"


def write_run(folder: Path) -> Path:
    """The tiny run over many raw shards, of some 4 steps each."""
    file = write_tiny_run(folder)
    for path in folder.glob("topics-*.jsonl"):
        path.unlink()
    texts = [topics[name] for name in sorted(topics)]
    for shard in range(NUM_SHARDS):
        rows = [json.dumps({"text": texts[(5 * shard + row) % len(texts)][shard : shard + 400]}) for row in range(5)]
        (folder / f"topics-{shard:03d}.jsonl").write_text("\n".join(rows) + "\n")
    return file


def command(file: Path, run_dir: Path, *arguments: str) -> list[str]:
    settings = ["data.streaming=true", "data.group_shards=1", "data.window_documents=5", "checkpoint.every_steps=2"]
    words = [argument for setting in [*settings, f"run.dir={run_dir}"] for argument in ("--set", setting)]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    return [*launcher, "-m", "dsft", "train", str(file), *words, *arguments]


def running(launcher: int, module: str) -> list[psutil.Process]:
    """Processes below a launcher that were started with ``-m module``."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            words: Sequence[str] = process.cmdline()
        except psutil.Error:
            continue
        if "-m" in words and words[list(words).index("-m") + 1] == module:
            found.append(process)
    return found


def saved_step(run_dir: Path) -> int:
    """Step of the newest checkpoint; 0: there is none yet."""
    checkpoint = newest(run_dir / "checkpoints")
    return 0 if checkpoint is None else step_of(checkpoint) or 0


@pytest.mark.launch
@pytest.mark.timeout(300)
def test_a_run_is_killed_while_most_is_raw_and_goes_on(tmp_path: Path) -> None:
    file, run_dir, log = write_run(tmp_path), tmp_path / "run", tmp_path / "log"
    environ = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with launched(command(file, run_dir, "--set", "train.steps=400"), log, environ) as process:
        while saved_step(run_dir) < 4:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        (ahead,) = running(process.pid, AHEAD)
        for rank in running(process.pid, "dsft"):
            rank.kill()
        assert psutil.wait_procs([ahead], timeout=30)[1] == [], "it ends with the rank that started it"
    store = next(path for path in (tmp_path / "store").iterdir() if path.name.startswith("topics-"))
    assert 0 < len(list(store.glob("shard-*.index"))) < NUM_SHARDS, "training began while most was raw"

    last = saved_step(run_dir) + 5
    words = command(file, run_dir, "--set", f"train.steps={last}", "--resume", "auto")
    assert exit_code(words, log, environ, 120) == EXIT_OK, log.read_text()
    assert run_cli(["prepare", str(file), "--set", f"run.dir={run_dir}"]) == EXIT_OK
    report = verify_run(run_dir, lambda step, end: None)
    assert report.is_proved, report.problems
    assert report.steps == last
    assert len(report.attempts) == 2


def test_a_dry_run_counts_what_is_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_tiny_run(tmp_path)
    assert run_cli(["train", str(file), "--set", "data.streaming=true", "--dry-run"]) == EXIT_USAGE
    assert "--set data.streaming=false" in capsys.readouterr().err

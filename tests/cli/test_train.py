"""``dsft train`` from the command line, as one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tokenizers import tiny_tokenizer_folder
from tests.support.wandb_files import history

pytestmark = [pytest.mark.launch]

CONFIG = """\
run: {{name: cli, dir: {folder}/run, advice: {folder}/advice.json}}
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}}
  tokenizer: {tokenizer}
  dtype: fp32
data:
  pack_tokens: 64
  sources: [{{name: notes, path: {folder}/notes.jsonl}}]
train: {{epochs: 2, global_batch_packs: 4, lr: 1e-3}}
log: {{sinks: [jsonl, tensorboard, wandb, mlflow]}}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    records = [json.dumps({"text": f"Note {n}: the meeting moved to room {n * 7 % 13}."}) for n in range(60)]
    (tmp_path / "notes.jsonl").write_text("\n".join(records) + "\n")
    (tmp_path / "advice.json").write_text(json.dumps({"verdict": {}, "factors": [], "evidence": {}}))
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, tokenizer=tiny_tokenizer_folder(tmp_path)))
    return path


def dsft(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsft", *arguments]
    environ = {"WANDB_MODE": "offline", **environ}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **environ}
    )


def records(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.timeout(300)
def test_dry_run_proves_that_documents_are_kept_apart(config_file: Path) -> None:
    settings = (
        "model.config.model_type=lfm2",
        "model.config.num_key_value_heads=2",
        "model.config.layer_types=[conv, full_attention]",
    )
    dry = dsft("train", str(config_file), "--dry-run", *(word for setting in settings for word in ("--set", setting)))
    assert dry.returncode == 2
    assert "documents would leak into each other: refused" in dry.stderr


@pytest.mark.timeout(300)
def test_dry_run_says_what_training_then_does(config_file: Path) -> None:
    run = config_file.parent / "run"
    dry = dsft("train", str(config_file), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not (run / "checkpoints").exists()
    assert not (run / "metrics.jsonl").exists()
    for name in ("tensorboard", "wandb", "mlflow", "trackers.json", "advice.json"):
        assert not (run / name).exists()
    assert not list(run.glob(".dry-run-*"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    real = dsft("train", str(config_file), "--profile-steps", "1:3", **place, MASTER_PORT=port)
    assert real.returncode == 0, real.stderr
    steps = records(run, "step")
    assert f"dry run: {steps[-1]['step']:,} steps" in dry.stderr
    assert f"{steps[-1]['tokens_trained']:,} document tokens" in dry.stderr
    assert "2.000 epochs" in dry.stderr
    trace = json.loads((run / "profile" / "trace-rank0.json").read_text())
    assert trace["traceEvents"]
    assert list((run / "tensorboard").glob("events.*"))
    assert records(run, "warning") == []
    assert (run / "advice.json").read_bytes() == (run.parent / "advice.json").read_bytes()
    (offline,) = (run / "wandb").glob("offline-run-*/*.wandb")
    shown = [(row["step"], row["step/loss"]) for row in history(offline) if "step/loss" in row]
    assert shown == [(step["step"], step["loss"]) for step in steps]
    (losses,) = (run / "mlflow").glob("*/*/metrics/step/loss")
    assert [int(line.split()[2]) for line in losses.read_text().splitlines()] == [step["step"] for step in steps]
    assert json.loads((run / "run_state.json").read_text())["status"] == "finished"
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "66 MiB of memory left behind by each rank"
    again = dsft("train", str(config_file))
    assert again.returncode == 2
    assert "--resume auto" in again.stderr
    assert "Traceback" not in again.stderr
    assert json.loads((run / "run_state.json").read_text())["status"] == "finished"

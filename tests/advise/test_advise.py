"""``dsft advise`` as a user runs it: on real text and pairs, and the run that it writes trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dsft.cli.main import run
from dsft.config.load import load_config
from tests.support.launch import exit_code
from tests.support.tokenizers import VOCAB_TOKENS, tiny_tokenizer_folder

LIMIT_SECONDS = 240.0
STATED = ["--task", "broad", "--control", "low", "--sensitivity", "medium"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, text about Python, questions about it, and general text from other topics."""
    folder = tmp_path_factory.mktemp("advise")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB_TOKENS, max_position_embeddings=512, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_tokenizer_folder(folder)).save_pretrained(folder / "model")
    names = sorted(topics)
    texts = {"general": names[::4], "text": [name for at, name in enumerate(names) if at % 4]}
    for name, chosen in texts.items():
        parts = [topics[topic][at : at + 900] for topic in chosen for at in range(0, len(topics[topic]), 900)]
        _write(folder / f"{name}.jsonl", [{"text": part} for part in parts])
    lines = [line.strip() for topic in texts["text"] for line in topics[topic].splitlines() if len(line.split()) > 7]
    pairs = [
        {"instruction": f"Go on: {' '.join(line.split()[:3])}", "output": " ".join(line.split()[3:])}
        for line in dict.fromkeys(lines[:400])
    ]
    _write(folder / "pairs.jsonl", [*pairs, *pairs[:20]])
    return folder


def _write(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _dsft(folder: Path, log: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "dsft", *arguments]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    assert exit_code(command, folder / log, environment, LIMIT_SECONDS) == 0, (folder / log).read_text()
    return (folder / log).read_text()


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_what_it_writes_trains(folder: Path) -> None:
    sources = [part for name in ("text", "pairs", "general") for part in (f"--{name}", str(folder / f"{name}.jsonl"))]
    machines = ["--hosts", "1x1xCPU-16GB", "--tflops", "0.01", "--max-device-hours", "10"]
    out = str(folder / "out")
    arguments = ["--model", str(folder / "model"), *sources, *STATED, *machines, "--goal", "to try", "--out", out]
    said = _dsft(folder, "advise.log", "advise", *arguments)
    assert "recommended: both" in said
    advice: dict[str, Any] = json.loads((folder / "out" / "advice.json").read_bytes())
    assert advice["method"] == "both"
    evidence = advice["evidence"]
    assert evidence["pairs"]["duplicate_share"] > 0.03
    assert evidence["pairs"]["found_in_text_share"] > 0.75  # the answers are lines of the text
    assert evidence["surprise"] == pytest.approx(1.0, abs=0.1)  # a random model knows neither
    assert set(advice["costs"]) == {"supervised", "unsupervised", "both"}
    assert all(cost["device_hours"] > 0 for cost in advice["costs"].values())

    config = load_config(folder / "out" / "run.yaml")
    assert [stage.name for stage in config.data.stages] == ["text", "mixed"]
    shares = [sum(stage.weights.values()) for stage in config.data.stages]
    assert shares == pytest.approx([1.0, 1.0])
    assert {one.name for one in config.evaluate.sets} >= {"held-out-text", "held-out-pairs", "learned-by-heart"}
    few = ["--set", "train.tokens=12000", "--set", "data.stages.0.until_tokens=4000", "--set", "evaluate.every_steps=9"]
    few += ["--set", "evaluate.sets.1.generate=4", "--set", "evaluate.at_stage_ends=false", "--set", "train.lr=3e-3"]
    short = ["--set", "data.stages.1.until_tokens=12000", "--set", "train.schedule.warmup_tokens=500"]
    decay = ["--set", "train.schedule.decay_tokens=8000", "--set", "train.global_batch_packs=4"]
    _dsft(folder, "train.log", "train", str(folder / "out" / "run.yaml"), *few, *short, *decay)
    assert (folder / "out" / "run" / "advice.json").read_bytes() == (folder / "out" / "advice.json").read_bytes()
    assert run(["report", str(folder / "out" / "run")]) == 0
    page = (folder / "out" / "run" / "report.md").read_text()
    assert "| goal | to try |" in page
    assert "| recommended | both: " in page
    assert ": learn text: lower loss on held-out-text (" in page
    lines = [json.loads(line) for line in (folder / "out" / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control", "low", "--sensitivity", "low"], "--task cannot be measured"),
        ([*STATED, "--max-device-hours", "3"], "needs --hosts"),
        ([*STATED, "--hosts", "4xH100"], "is not HOSTSxDEVICESxDEVICE"),
        ([*STATED], "give --text, --pairs, or both"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["advise", "--model", "none", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err

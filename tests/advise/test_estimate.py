"""Whole estimates: what fits, what is fastest, what it costs; and the command's tables and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsft.advise.estimate import Assumptions, Estimate, estimate
from dsft.advise.machines import parse_hosts
from dsft.cli.main import run
from dsft.config.load import load_config
from dsft.errors import ConfigError
from tests.support.ranks import REPOSITORY

RUN_YAML = """\
run: {name: big, dir: runs/big}
model:
  config: {model_type: llama, vocab_size: 128256, hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32,
           num_attention_heads: 32, num_key_value_heads: 8}
  tokenizer: unused
  dtype: bf16
  activation_checkpointing: true
data: {pack_tokens: 8192, sources: [{name: text, path: x.jsonl}]}
train: {tokens: 1B, global_batch_packs: 128, lr: 1e-5}
deepspeed: ds_configs/zero3.json
"""
DS_CONFIGS = sorted((REPOSITORY / "ds_configs").glob("*.json"))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(REPOSITORY)
    path = tmp_path / "run.yaml"
    path.write_text(RUN_YAML)
    return path


def of(file: Path, hosts: str, *overrides: str, files: list[Path] | None = None, **assumed: Any) -> Estimate:
    return estimate(load_config(file, overrides), parse_hosts(hosts), Assumptions(**assumed), files or [])


def test_an_eight_billion_model_on_one_and_on_four_hosts(file: Path) -> None:
    one, four = of(file, "1x8xH100-80GB", files=DS_CONFIGS), of(file, "4x8xH100-80GB", files=DS_CONFIGS)
    assert one.shape.num_parameters == 8_030_261_248
    assert one.written.fits
    assert four.written.memory.peak("device") < one.written.memory.peak("device")
    assert one.steps == four.steps == math.ceil(1e9 / (128 * 8192))
    fitting = {Path(choice.deepspeed).name: choice.fits for choice in one.configurations if choice.checkpointing}
    assert fitting["zero1.json"] is True  # 6 + 12/8 bytes a parameter are 60 GB
    assert fitting["zero3.json"] is True
    assert fitting["zero3_offload.json"] is None  # depends on the host's memory, which nobody stated
    tight = of(file, "1x8xL40S-24GB", files=DS_CONFIGS)
    assert {Path(c.deepspeed).name: c.fits for c in tight.configurations if c.checkpointing}["zero1.json"] is False
    assert one.fastest is not None
    assert one.fastest.hours == min(c.hours for c in one.configurations if c.fits and c.hours is not None)


def test_time_is_arithmetic_over_the_stated_rate(file: Path) -> None:
    found = of(file, "1x8xH100-80GB", "deepspeed=ds_configs/zero1.json", tflops=400.0, price=2.5, document_tokens=1000)
    step = found.written.step
    assert step is not None
    per_token = 6 * (8_030_261_248 - 2 * 128256 * 4096) * 4 / 3 + 6 * 128256 * 4096  # checkpointing: one more forward
    tokens = 128 * 8192 / 8
    assert step.compute == pytest.approx(tokens * per_token / 400e12, rel=0.03)  # and attention over short documents
    assert found.device_hours == pytest.approx(8 * found.steps * step.total / 3600)


def test_the_largest_micro_batch_fits_and_the_next_does_not(file: Path) -> None:
    found = of(file, "1x8xH100-80GB")
    most = found.largest_micro_batch_packs
    assert 1 <= most < 16
    fits = [of(file, "1x8xH100-80GB", f"train.micro_batch_packs={packs}").written.fits for packs in (most, most + 1)]
    assert fits == [True, False]


def test_a_length_in_epochs_needs_the_datas_tokens(file: Path) -> None:
    overrides = ("train.tokens=null", "train.epochs=2")
    with pytest.raises(ConfigError, match=r"train\.epochs.*--data-tokens"):
        of(file, "1x8xH100-80GB", *overrides)
    assert of(file, "1x8xH100-80GB", *overrides, data_tokens=5 * 10**8).steps == math.ceil(1e9 / (128 * 8192))


def test_the_command_prints_tables_json_and_clear_errors(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", str(file), "--hosts", "4x8xH100-80GB", "--host-memory", "2TB", "--price", "2.5"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["parameters"] == 8_030_261_248
    assert found["money"] == pytest.approx(2.5 * found["device_hours"])
    assert len(found["configurations"]) == 2 * len(DS_CONFIGS)
    assert all(choice["fits"] is not None for choice in found["configurations"])
    assert found["written"]["device_peak_bytes"] < 80e9
    assert run(arguments) == 0
    text = capsys.readouterr().out
    for said in ("8,030,261,248 parameters", "logits", "largest micro-batch", "fastest that fits", "not measured"):
        assert said in text
    for wrong, message in (
        (["--hosts", "many"], "write for example"),
        (["--hosts", "1x8xH100-80GB", "--host-memory", "lots"], "--host-memory"),
        (["--hosts", "1x8xH100-80GB", "--price", "cheap"], "--price"),
        (["--hosts", "1x8xH100-80GB", "--here"], "one of --hosts"),
        (["--hostfile", "hosts.txt"], "--device"),
        ([], "one of --hosts"),
    ):
        assert run(["estimate", str(file), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_an_unknown_device_has_memory_but_no_time(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", str(file), "--hosts", "1x8xXPU-80GB"]) == 0
    text = capsys.readouterr().out
    assert "give --tflops" in text
    assert "fits" in text

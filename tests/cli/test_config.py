from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dsft.cli.main import run
from dsft.config.load import config_to_json, load_config
from tests.support.run_yaml import write_run_yaml


def test_show_prints_yaml_that_loads_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run_yaml(tmp_path)
    assert run(["config", "show", str(path), "--set", "train.lr=3e-4", "--set", "run.seed=5"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["train"]["lr"] == 3e-4
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(shown)
    assert config_to_json(load_config(resolved)) == config_to_json(load_config(path, ["train.lr=3e-4", "run.seed=5"]))


def test_check_says_what_a_step_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run_yaml(tmp_path)
    assert run(["config", "check", str(path), "--world-size", "3"]) == 0
    out = capsys.readouterr().out
    assert "is valid" in out
    assert "at 3 rank(s) a step is 7 packs of 256 tokens, in 2 micro-batch(es) of 2 a rank" in out


def test_check_finds_a_conflict_with_the_deepspeed_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3},\n"train_batch_size": 64}')
    path = write_run_yaml(tmp_path)
    assert run(["config", "check", str(path), "--set", f"deepspeed={file}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{file}, line 2: train_batch_size is 64" in captured.err
    assert str(path) in captured.err


def test_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"] == "A dsft run"

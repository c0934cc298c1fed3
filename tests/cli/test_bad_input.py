"""What a user gets wrong in the configuration of ``dsft train``: one paragraph, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsft.cli.main import run
from tests.support.run_yaml import write_run_yaml


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("seed: 17", "sede: 17", ["run.yaml, line 1: run.sede: unknown key; did you mean run.seed?"]),
        ("dtype: fp32", "dtype: 32", ["run.yaml, line 4: model.dtype: expected 'fp32' or 'bf16', got 32"]),
        ("lr: 1e-5", "lr: 1e-5\ndeepspeed: none.json", ["deepspeed in run.yaml: cannot read none.json"]),
        (
            "lr: 1e-5",
            "lr: 1e-5\ndeepspeed: {zero_optimization: {stage: 3}, train_batch_size: 64}",
            ["train_batch_size is 64", "train.global_batch_packs (7)"],
        ),
        ("seed: 17", "world_size: 16", ["16"]),
    ],
    ids=["unknown key", "wrong type", "missing DeepSpeed file", "batch conflict", "world size"],
)
def test_train_refuses_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run_yaml(tmp_path, old, new)
    before = sorted(tmp_path.rglob("*"))
    assert run(["train", "run.yaml"]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert error.count("\n") == 1  # one paragraph
    assert sorted(tmp_path.rglob("*")) == before


def test_train_names_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "rum.yaml"]) == 2
    assert "there is no file rum.yaml" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

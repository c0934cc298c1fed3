"""``make gpu-check`` where there is no GPU, and its steps as far as they run without one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "check.py"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "no CUDA device" in done.stdout
    assert not done.stderr


def test_a_failed_step_fails_the_whole_and_everything_is_written(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"device": "A Device 9000", "date": "2030-01-02"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "environment", lambda: about)

    def works(step: object, deadline: object) -> None:
        program.run(step, [sys.executable, "-c", "print(1)"], 30, deadline)

    def fails(step: object, deadline: object) -> None:
        program.run(step, [sys.executable, "-c", "raise SystemExit('it broke')"], 30, deadline)

    def hangs(step: object, deadline: object) -> None:
        program.run(step, [sys.executable, "-c", "import time; time.sleep(60)"], 1, deadline)

    monkeypatch.setattr(program, "STEPS", {"one": works, "two": works})
    assert program.main() == 0
    monkeypatch.setattr(program, "STEPS", {"one": works, "two": fails, "three": hangs, "four": works})
    assert program.main() == 1
    said = capsys.readouterr().out
    assert "it broke" in said
    result = json.loads((program.RESULTS / "a-device-9000-2030-01-02.json").read_text())
    assert result["device"] == "A Device 9000"
    assert [step["status"] for step in result["steps"]] == ["passed", "failed", "failed", "passed"]
    assert "not done after 1 s" in result["steps"][2]["said"]
    monkeypatch.setattr(program, "STEPS", {"build": fails, "check": works})
    assert program.main() == 1
    assert "the build failed" in capsys.readouterr().out


def test_the_run_it_trains_is_a_valid_configuration(program: ModuleType, tmp_path: Path) -> None:
    from dsft.config.load import load_config

    text = program.RUN_YAML.format(folder=tmp_path, tokenizer=tmp_path, repository=PROGRAM.parents[2])
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml", [])
    assert config.kernels == "native"
    assert config.model.dtype == "bf16"

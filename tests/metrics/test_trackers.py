"""Weights & Biases (offline) and MLflow (files), the real packages: what was logged is read back; a resume goes on."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from dsft.config.models import RunConfig
from dsft.errors import ConfigError
from dsft.metrics import trackers
from dsft.metrics.recorder import METRICS_NAME, Recorder
from dsft.metrics.trackers import TRACKERS_NAME, TrackedRun, hyper_parameters
from tests.metrics.test_recorder import STEP
from tests.support.wandb_files import history, records


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def attempt(folder: Path, sink: str, begin: int, losses: dict[int, float], *, failed: bool = False) -> None:
    run = TrackedRun(folder, "medical", "papers", {"train.lr": "1e-3", "long": "x" * 9_000})
    recorder = Recorder(folder, ["jsonl", sink], is_main=True, tracked=run)
    recorder.begin(begin)
    for step, loss in losses.items():
        recorder.write("step", {**STEP, "step": step, "loss": loss})
    recorder.write("evaluation", {"step": max(losses), "set": "held", "loss": 7.5})
    recorder.close(failed=failed)


def warnings(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]
    return [line["message"] for line in lines if line["kind"] == "warning"]


def test_weights_and_biases_goes_on_with_one_run(tmp_path: Path) -> None:
    attempt(tmp_path, "wandb", 0, {1: 5.0, 2: 4.0, 3: 3.0}, failed=True)
    time.sleep(1.1)  # the folder's name has the second
    attempt(tmp_path, "wandb", 2, {3: 2.0, 4: 1.0})
    assert warnings(tmp_path) == []
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    (run_id,) = {path.stem.removeprefix("run-") for path in files}
    assert json.loads((tmp_path / TRACKERS_NAME).read_bytes()) == {"wandb": run_id}
    first, second = (history(path) for path in files)
    assert [(row["step"], row["step/loss"]) for row in first if "step/loss" in row] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert [(row["step"], row["step/loss"]) for row in second if "step/loss" in row] == [(3, 2.0), (4, 1.0)]
    assert first[-1] == {"step": 3, "evaluation/held/loss": 7.5}
    assert first[0]["step/loss_by_source/papers"] == 2.25
    (run,) = [record.run for record in records(files[0]) if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.display_name, run.project) == (run_id, "medical", "papers")
    metrics = [record.metric for record in records(files[0]) if record.WhichOneof("record_type") == "metric"]
    assert any(metric.step_metric == "step" for metric in metrics)


def test_mlflow_goes_on_with_one_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    attempt(tmp_path, "mlflow", 0, {1: 5.0, 2: 4.0, 3: 3.0}, failed=True)
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("papers")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    attempt(tmp_path, "mlflow", 2, {3: 2.0, 4: 1.0})
    assert warnings(tmp_path) == []
    (again,) = client.search_runs([experiment.experiment_id])
    assert (again.info.run_id, again.info.status, again.info.run_name) == (run.info.run_id, "FINISHED", "medical")
    assert json.loads((tmp_path / TRACKERS_NAME).read_bytes()) == {"mlflow": run.info.run_id}
    assert again.data.params == {"train.lr": "1e-3", "long": "x" * 500}
    shown = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "step/loss")]
    assert shown == [(1, 5.0), (2, 4.0), (3, 3.0), (3, 2.0), (4, 1.0)]
    assert again.data.metrics["evaluation/held/loss"] == 7.5


class _Stuck:
    """A client that answers once, and never again."""

    def __init__(self, run: TrackedRun) -> None:
        self.answers = 1

    def log(self, step: int, scalars: trackers.Scalars) -> None:
        time.sleep(0 if self.answers else 3600)
        self.answers = 0

    def close(self, failed: bool) -> None:
        raise AssertionError


def test_a_server_that_is_not_there_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, logger="dsft"):
        attempt(tmp_path, "mlflow", 0, {1: 5.0})
    assert len(warnings(tmp_path)) == 1
    assert "mlflow is given up until the next start" in warnings(tmp_path)[0]
    assert not (tmp_path / TRACKERS_NAME).exists()


def test_a_server_that_does_not_answer_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.KINDS, "mlflow", _Stuck)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    attempt(tmp_path, "mlflow", 0, {step: 1.0 for step in range(1, 1000)})
    assert "has not taken all numbers" in warnings(tmp_path)[0]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("is_main", [True, False])
def test_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_main: bool
) -> None:
    (tmp_path / name).mkdir()  # W&B itself leaves a folder ./wandb, which Python takes for a package
    real = importlib.util.find_spec

    def find(wanted: str, *_: Any) -> Any:
        return importlib.machinery.PathFinder.find_spec(wanted, [str(tmp_path)]) if wanted == name else real(wanted)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ConfigError, match=rf"dsft\[{name}\]"):
        Recorder(tmp_path, ["jsonl", name], is_main=is_main)


def test_only_rank_0_of_a_real_run_opens_one(tmp_path: Path) -> None:
    for is_main, tracked in ((False, TrackedRun(tmp_path, "r", "p", {})), (True, None)):  # None: a dry run
        recorder = Recorder(tmp_path, ["jsonl", "mlflow", "wandb"], is_main=is_main, tracked=tracked)
        recorder.begin(0)
        recorder.write("step", STEP)
        recorder.close()
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_NAME]


def test_no_path_of_data_leaves_the_machine() -> None:
    config = RunConfig.model_validate(
        {
            "run": {"name": "r", "dir": "runs/r"},
            "model": {"path": "models/base"},
            "data": {"pack_tokens": 64, "sources": [{"name": "s", "path": "secret/patients.jsonl"}]},
            "train": {"tokens": 100, "global_batch_packs": 1, "lr": 1e-3},
        }
    )
    found = hyper_parameters(config)
    assert (found["train.lr"], found["model.path"], found["data.pack_tokens"]) == ("0.001", "models/base", "64")
    assert "patients" not in str(found)

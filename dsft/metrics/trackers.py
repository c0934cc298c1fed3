"""Weights & Biases and MLflow, for people who look at many runs at once. ``metrics.jsonl`` stays the record of a run.

A tracker works on a thread of its own: a server that does not answer blocks its client for minutes, and training goes
on meanwhile. A tracker that fails is given up for this start, with a warning. Where and as whom it logs is said by the
packages' own environment variables (``WANDB_MODE=offline``, ``WANDB_API_KEY``, ``MLFLOW_TRACKING_URI``), so no key is
in a file of dsft. The run's id there is kept in ``trackers.json`` of the run folder: after a requeue the same run goes
on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsft.config.models import RunConfig
from dsft.errors import ConfigError
from dsft.fsio import write_json

TRACKERS_NAME = "trackers.json"
CLOSE_SECONDS = 60.0
"""A run that has ended waits so long for a tracker to send what is left."""
_MOST_PARAMETERS = 100
"""In one MLflow call (its limit)."""
_LONGEST_PARAMETER = 500
"""Characters; MLflow's servers take 500 to 6,000."""
_ids_lock = threading.Lock()

Scalars = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of the run.

    Attributes:
        folder: of the run. name: shown there. project: W&B's project, MLflow's experiment.
        parameters: name -> value; hyper-parameters, no path of data.
    """

    folder: Path
    name: str
    project: str
    parameters: dict[str, str]


class Tracker(Protocol):
    """One open run on a tracker; only its own thread calls it."""

    def log(self, step: int, scalars: Scalars) -> None:
        """Numbers of a step."""

    def close(self, failed: bool) -> None:
        """End the run there; a later start may go on with it."""


class WeightsAndBiases:
    """A run of W&B, online or offline.

    Its own step is not used: it drops steps smaller than the last, and a resume goes back. ``step`` is a column, and
    the axis of all charts.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        known = _known_id(run.folder, "wandb")
        run_id = known or secrets.token_hex(4)
        if known is None:
            _remember_id(run.folder, "wandb", run_id)
        settings = wandb.Settings(
            console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True,
            finish_timeout=CLOSE_SECONDS, finish_timeout_raises=True,
        )  # fmt: skip
        self._run: Any = wandb.init(
            project=run.project, id=run_id, name=run.name, dir=str(run.folder), resume="allow",
            config=dict(run.parameters), settings=settings,
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Scalars) -> None:
        """One row of the history."""
        self._run.log({"step": step, **dict(scalars)})

    def close(self, failed: bool) -> None:
        """Send or write what is left; ``finish`` alone returns before W&B's own process has flushed an offline file."""
        import wandb

        self._run.finish(exit_code=int(failed))
        wandb.teardown()


class MLflow:
    """A run of MLflow: on the server of MLFLOW_TRACKING_URI, else in files in the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            uri = (run.folder / "mlflow").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # refused without; a database needs all of mlflow
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        known = _known_id(run.folder, "mlflow")
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(run.project)
        place = self._client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(place, run_name=run.name).info.run_id
        _remember_id(run.folder, "mlflow", self._id)
        parameters = [Param(name, value[:_LONGEST_PARAMETER]) for name, value in run.parameters.items()]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + _MOST_PARAMETERS])

    def log(self, step: int, scalars: Scalars) -> None:
        """One request."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(name, value, now, step) for name, value in scalars])

    def close(self, failed: bool) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}
"""Name in ``log.sinks`` -> what opens it."""


class Background:
    """A tracker on its own thread, which begins with opening it.

    Attributes:
        failure: why it was given up; None while it works.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name = name
        self.failure: str | None = None
        self._waiting: queue.SimpleQueue[tuple[int, Scalars] | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(KINDS[name], run), name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, scalars: Scalars) -> None:
        """Numbers of a step; returns at once."""
        if self.failure is None:
            self._waiting.put((step, scalars))

    def close(self, failed: bool) -> None:
        """Wait for what is left, ``CLOSE_SECONDS`` at most."""
        self._waiting.put(failed)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self.failure = f"it has not taken all numbers {CLOSE_SECONDS:g} s after the end of the run"

    def _work(self, kind: Callable[[TrackedRun], Tracker], run: TrackedRun) -> None:
        try:
            tracker = kind(run)
            while not isinstance(item := self._waiting.get(), bool):
                tracker.log(*item)
            tracker.close(failed=item)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (whatever a server or its client does, training
            # goes on; W&B raises the latter at the end of input, where it asks a terminal for a key)
            self.failure = str(error) or type(error).__name__


def check_installed(name: str) -> None:
    """Raise ConfigError where the package of a sink is not installed. A mere folder of that name is not it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ConfigError(
            f"log.sinks names {name}, which is not installed. Install it (pip install 'dsft[{name}]'), or "
            "remove it from log.sinks."
        )


def _known_id(folder: Path, name: str) -> str | None:
    ids = _read_ids(folder)
    return None if name not in ids else str(ids[name])


def _remember_id(folder: Path, name: str, run_id: str) -> None:
    with _ids_lock:
        write_json(folder / TRACKERS_NAME, {**_read_ids(folder), name: run_id})


def _read_ids(folder: Path) -> dict[str, Any]:
    path = folder / TRACKERS_NAME
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return found


def hyper_parameters(config: RunConfig) -> dict[str, str]:
    """What a tracker shows beside the curves: model, training and seed; no path of data leaves the machine."""
    sections = {"model": config.model.model_dump(mode="json"), "train": config.train.model_dump(mode="json")}
    flat = {f"{name}.{key}": str(value) for name, section in sections.items() for key, value in section.items()}
    return {**flat, "run.seed": str(config.run.seed), "data.pack_tokens": str(config.data.pack_tokens)}

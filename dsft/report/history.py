"""A run's records as one history: what a crash rolled back is not in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.errors import DataError
from dsft.metrics.recorder import METRICS_NAME
from dsft.train.followed_advice import ADVICE_NAME

_KINDS = ("step", "evaluation", "bias", "checkpoint", "warning", "resume")
"""Of records, in the order of :class:`History`'s fields."""


@dataclass(frozen=True, slots=True)
class History:
    """Records of a run folder in order; each a dictionary as ``metrics.jsonl`` holds it.

    Attributes:
        config: the resolved configuration. state: ``run_state.json``.
        steps, evaluations, bias, checkpoints, warnings: of the lineage that was kept.
        resumes: every start that went on from a checkpoint.
        advice: what ``dsft advise`` recommended, where the run follows it.
    """

    folder: Path
    config: dict[str, Any]
    state: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    bias: tuple[dict[str, Any], ...]
    checkpoints: tuple[dict[str, Any], ...]
    warnings: tuple[dict[str, Any], ...]
    resumes: tuple[dict[str, Any], ...]
    advice: dict[str, Any] | None

    def sets(self) -> list[str]:
        """Names of the held-out sets that were measured, in order."""
        return list(dict.fromkeys(record["set"] for record in self.evaluations))

    def of_set(self, name: str) -> list[dict[str, Any]]:
        """A set's evaluations, by step."""
        return [record for record in self.evaluations if record["set"] == name]


def read_history(folder: Path) -> History:
    """Read a run folder; the run may still be going on, or have failed.

    Raises:
        DataError: it is no run folder, or a record cannot be read.
    """
    path = folder / METRICS_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        config, state = (_read_json(folder / name) for name in ("config.json", "run_state.json"))
    except OSError as error:
        raise DataError(
            f"{folder} is not the folder of a run that has begun ({error.strerror}: {error.filename}); give run.dir of "
            "its YAML file."
        ) from error
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _KINDS}
    for number, line in enumerate(lines[:-1], start=1):  # what has no newline is being written, or was cut off
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); the file is damaged.") from error
        if record.get("kind") == "resume":
            for kind in ("step", "evaluation", "bias", "checkpoint"):
                kinds[kind] = [kept for kept in kinds[kind] if kept["step"] <= record["step"]]
        if record.get("kind") in kinds:
            kinds[record["kind"]].append(record)
    advice = _read_json(folder / ADVICE_NAME) if (folder / ADVICE_NAME).is_file() else None
    steps, evaluations, bias, checkpoints, warnings, resumes = (tuple(kinds[kind]) for kind in _KINDS)
    return History(folder, config, state, steps, evaluations, bias, checkpoints, warnings, resumes, advice)


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    assert isinstance(value, dict)
    return value

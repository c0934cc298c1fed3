"""What the comparing benchmarks share: what is done is not done again, and a comparison has every arm and seed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("arms")
    finally:
        sys.path.remove(str(FOLDER))


def test_mean_and_spread(program: ModuleType) -> None:
    assert program.summary([1.0, 3.0]) == {"mean": 2.0, "spread": pytest.approx(2**0.5), "seeds": [1.0, 3.0]}
    assert program.summary([1.0])["spread"] is None


def test_what_is_done_is_kept_and_not_done_again(program: ModuleType, tmp_path: Path) -> None:
    assert program.once(tmp_path, "arm", lambda: {"f1": 0.1}) == {"f1": 0.1}
    assert program.once(tmp_path, "arm", lambda: pytest.fail("measured twice")) == {"f1": 0.1}
    with pytest.raises(KeyboardInterrupt):
        program.once(tmp_path, "other", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert program.once(tmp_path, "other", lambda: 2) == 2
    assert 0 <= program.seconds_of(tmp_path) < 60


def test_a_folder_of_other_sizes_is_refused(program: ModuleType, tmp_path: Path) -> None:
    program.hold_sizes(tmp_path, program.Budget(10, 5, (1, 2), 3))
    program.hold_sizes(tmp_path, program.Budget(10, 5, (1, 2), 3))
    with pytest.raises(SystemExit, match="other sizes"):
        program.hold_sizes(tmp_path, program.Budget(10, 6, (1, 2), 3))


def test_a_comparison_has_every_arm_and_seed_and_goes_on_where_it_was(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"base": 2.0, "one-1": 2.5, "one-2": 2.75, "two-1": 3.0, "two-2": 4.0}
    trained: list[str] = []

    def train_arm(folder: Path, name: str, content: dict[str, Any]) -> tuple[dict[str, Any], float]:
        trained.append(name)
        assert name == f"corpus-{content['arm']}-{content['seed']}"
        return {"general": {"loss": losses[name.removeprefix("corpus-")]}}, 7.0

    monkeypatch.setattr(program, "train_arm", train_arm)
    monkeypatch.setattr(program, "evaluate_base", lambda *_: {"general": {"loss": losses["base"]}})

    def compare() -> Any:
        return program.compare(
            tmp_path, "corpus", tmp_path / "out", tmp_path / "model", ("one", "two"), (1, 2),
            lambda arm, seed: {"arm": arm, "seed": seed},
            lambda sets, before, seconds: {"forgetting": sets["general"]["loss"] - before, "seconds": seconds},
        )  # fmt: skip

    found = compare()
    assert {arm: metrics["forgetting"]["seeds"] for arm, metrics in found.items()} == {
        "nothing": [0.0],
        "one": [0.5, 0.75],
        "two": [1.0, 2.0],
    }
    assert found["one"]["seconds"]["mean"] == 7.0
    (tmp_path / "done" / "corpus-two-1.json").unlink()
    assert json.dumps(compare()) == json.dumps(found)
    assert trained == ["corpus-one-1", "corpus-two-1", "corpus-one-2", "corpus-two-2", "corpus-two-1"]

"""What the four arms are trained and judged on: disjoint data, and a verdict that can go against the advice."""

from __future__ import annotations

import importlib
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
        return importlib.import_module("four_arms")
    finally:
        sys.path.remove(str(FOLDER))


def arms(program: ModuleType, **f1: float) -> dict[str, Any]:
    summary = sys.modules["arms"].summary
    return {
        name: {metric: summary([f1[name] if metric == "answer_f1" else 1.0]) for metric in program.METRICS}
        for name in program.ARMS
    }


@pytest.mark.parametrize(
    ("method", "right"), [("both", True), ("supervised", True), ("unsupervised", False), ("none", False)]
)
def test_advice_is_wrong_where_another_arm_answers_better(program: ModuleType, method: str, right: bool) -> None:
    measured = arms(program, nothing=0.1, supervised=0.31, unsupervised=0.2, both=0.3)
    verdict = program.judge({"method": method, "verdict": {"rule": "r", "because": "b"}}, measured)
    assert (verdict["right"], verdict["best_f1"]) == (right, "supervised")
    assert ("WRONG" in program.table("c", measured, verdict)) != right


def test_pairs_of_the_reference_follow_one_another() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        corpora = importlib.import_module("four_arms_corpora")
    finally:
        sys.path.remove(str(FOLDER))
    text = "One two three four five. Six seven eight nine ten.\n\nToo short."
    (pair,) = corpora.reference_pairs({"topic": text})
    assert [message["content"] for message in pair["messages"]] == [
        "In the section `topic`, what follows this: One two three four five?",
        "Six seven eight nine ten.",
    ]
    assert corpora.spread(list(range(10)), 4) == [0, 2, 5, 7]

"""The question, the recommendation and a verdict per goal are on the page, and follow what was asked and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsft.advise.advice import Advice, Cost, to_json
from dsft.advise.evidence import Evidence, GeneralEvidence, PairsEvidence, Situation, TextEvidence
from dsft.advise.factors import factors
from dsft.advise.rules import decide
from dsft.report.goals import Goal, goals
from dsft.report.history import History, read_history
from dsft.report.page import html_page, markdown
from dsft.train.followed_advice import ADVICE_NAME
from tests.report.test_report import CONFIG, evaluation, write_run

EVALUATE: dict[str, Any] = {
    "sets": [
        {"name": "qa", "source": "pairs", "generate": 8, "max_rise": None, "memorisation": {"max_share": 0.01}},
        {"name": "general", "source": None, "generate": 0, "max_rise": 0.1, "memorisation": None},
    ],
    "bias": [{"name": "jobs", "max_rise": 0.1}, {"name": "unlimited", "max_rise": None}],
}


def history(folder: Path, records: list[dict[str, Any]], advice: dict[str, Any] | None = None) -> History:
    write_run(folder, records)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "evaluate": EVALUATE}))
    if advice is not None:
        (folder / ADVICE_NAME).write_text(json.dumps(advice))
    return read_history(folder)


def general(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "set": "general", "loss": loss, "loss_interval": [loss - 1, loss + 1]}


def bias(step: int, change: float, low: float) -> dict[str, Any]:
    interval = [low, change + (change - low)]
    change_of = {"change": change, "change_interval": interval}
    return {"kind": "bias", "step": step, "set": "jobs", "test": "templates", "value": 0.5 + change, **change_of}


def words(found: list[Goal]) -> list[str]:
    return [goal.word for goal in found]


def test_each_goal_has_its_verdict(tmp_path: Path) -> None:
    first = [{**evaluation(0, 5.0, 0.1), "memorised_share": 0.0}, general(0, 2.0), bias(0, 0.0, 0.0)]
    good = [{**evaluation(9, 1.0, 0.9), "memorised_share": 0.01}, general(9, 2.05), bias(9, 0.3, -0.1)]
    bad = [{**evaluation(9, 9.0, 0.1), "memorised_share": 0.02}, general(9, 2.2), bias(9, 0.3, 0.1)]
    assert words(goals(history(tmp_path / "a", first + good))) == ["reached", "reached", "kept", "kept", "kept"]
    assert words(goals(history(tmp_path / "b", first + bad))) == ["missed", "not shown", "passed", "passed", "passed"]
    unknown = ["not measured", "not measured", "kept", "not measured", "not measured"]
    assert words(goals(history(tmp_path / "c", first))) == unknown
    assert set(words(goals(history(tmp_path / "d", [])))) == {"not measured"}


def test_a_users_checker_judges_answers_before_f1_does(tmp_path: Path) -> None:
    rates = {0: 0.5, 9: 0.1}
    records = [evaluation(step, 1.0, 0.1 + step / 10) for step in rates]
    for record in records:
        rate = rates[record["step"]]
        record["scores"]["pass_rate"], record["intervals"]["pass_rate"] = rate, [rate - 0.1, rate + 0.1]
    answered = goals(history(tmp_path / "run", records))[1]
    assert answered == Goal("answer qa better: higher pass_rate", "missed", "0.5 to 0.1")


def evidence() -> Evidence:
    pairs = PairsEvidence(900, 9_000, 60, 0.5, 0.0, 0.0, 0.0, 0.0, 0.9, 0.1, 0.8, 2.5, 0.2, (0.1, 0.3), 0.0, 0.05)
    return Evidence(
        num_parameters=10**8,
        text=TextEvidence(1_000, 5_000_000, 100, 0.01, 0.02, 0.0, 1.5, (1.4, 1.6)),
        pairs=pairs,
        general=GeneralEvidence(1_000_000, 1.0),
        situation=Situation("answers <about> our papers", "broad", "low", "low", 12.0),
        device_hours={},
    )


def advice() -> dict[str, Any]:
    """As ``dsft advise`` writes it: by its own rules and factors."""
    verdict = decide(evidence())
    costs = {"both": Cost(7_000_000, True, 3.25, None), "supervised": Cost(45_000, None, None, None)}
    return to_json(Advice(verdict, factors(evidence()), evidence(), costs, None))


@pytest.mark.parametrize("form", [html_page, markdown])
def test_question_recommendation_and_goals_are_told(tmp_path: Path, form: Any) -> None:
    records = [evaluation(0, 5.0, 0.1), evaluation(9, 1.0, 0.9)]
    page = form(history(tmp_path / "run", records, advice()))
    for said in (
        "The question", "answers &lt;about&gt; our papers", "broad, low, low", "12 device-hours",
        "5,000,000 tokens of text; 900 pairs; 1,000,000 tokens of general text",
        "What was recommended", "both: ", f"(source: {decide(evidence()).source})",
        "both 7,000,000 tokens, 3.25 device-hours; supervised 45,000 tokens", "task specificity", "ethics",
        "reached", "learn pairs: lower loss on qa (5 to 1)",
    ):  # fmt: skip
        assert said in page, said
    without = form(history(tmp_path / "none", records))
    assert "The question" not in without
    assert "What was recommended" not in without
    assert "learn pairs" in without

"""Each rule decides where it should, and says why with the numbers; a small change of one number changes the method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsft.advise.evidence import Evidence, GeneralEvidence, PairsEvidence, Situation, TextEvidence
from dsft.advise.factors import factors
from dsft.advise.rules import ENOUGH_PAIRS, MIN_PAIRS, MIN_TEXT_TOKENS, RULES, decide

TEXT = TextEvidence(1000, 2_000_000, 100, 0.01, 0.02, 0.0, 1.2, (1.1, 1.3))
PAIRS = PairsEvidence(5000, 400_000, 300, 0.4, 0.01, 0.02, 0.0, 0.0, 0.9, 0.05, 0.6, 2.5, 0.1, (0.05, 0.15), 0.0, 0.05)
GENERAL = GeneralEvidence(tokens=3_000_000, bits_per_byte=1.0)
SITUATION = Situation(goal="", task="broad", control="low", sensitivity="low")


def evidence(**changes: Any) -> Evidence:
    """Plenty of both, a broad task; ``text.tokens=5`` style changes go to the part they name."""
    parts: dict[str, Any] = {"text": TEXT, "pairs": PAIRS, "general": GENERAL, "situation": SITUATION}
    whole: dict[str, Any] = {"device_hours": {}}
    for key, value in changes.items():
        part, _, field = key.partition("__")
        if field:
            parts[part] = replace(parts[part], **{field: value})
        elif part in parts:
            parts[part] = value
        else:
            whole[part] = value
    return Evidence(num_parameters=1_000_000, **parts, **whole)


CASES = [
    ("too little of both", "none", {"pairs__pairs": 50, "text__tokens": 20_000}),
    ("control without pairs", "none", {"pairs__pairs": 50, "situation__control": "high"}),
    ("text that must not be given out, without pairs", "none", {"pairs": None, "situation__sensitivity": "high"}),
    ("too few pairs", "unsupervised", {"pairs__pairs": MIN_PAIRS - 1}),
    ("text that must not be given out", "supervised", {"situation__sensitivity": "high"}),
    ("too little text", "supervised", {"text__tokens": MIN_TEXT_TOKENS - 1}),
    (
        "answers are right already, and the text is known",
        "none",
        {"pairs__f1": 0.95, "text__bits_per_byte": 1.0, "pairs__found_in_text_share": 0.0},
    ),
    ("answers are right already", "unsupervised", {"pairs__f1": 0.95}),
    ("the text is known", "supervised", {"text__bits_per_byte": 1.04, "pairs__found_in_text_share": 0.1}),
    ("narrow task with enough pairs", "supervised", {"situation__task": "narrow"}),
    (
        "budget",
        "supervised",
        {"situation__max_device_hours": 5.0, "device_hours": {"supervised": 1.0, "unsupervised": 9.0, "both": 10.0}},
    ),
    ("both", "both", {}),
]


@pytest.mark.parametrize(("name", "method", "changes"), CASES, ids=[name for name, _, _ in CASES])
def test_each_rule_decides_its_case(name: str, method: str, changes: dict[str, Any]) -> None:
    verdict = decide(evidence(**changes))
    assert (verdict.rule, verdict.method) == (name, method)
    assert verdict.because
    assert verdict.otherwise
    assert verdict.source
    assert verdict.passed_over == tuple(rule.name for rule in RULES)[: [rule.name for rule in RULES].index(name)]


def test_every_rule_has_a_case() -> None:
    assert [name for name, _, _ in CASES] == [rule.name for rule in RULES]


def test_the_borders_are_where_they_are_said_to_be() -> None:
    assert decide(evidence(pairs__pairs=MIN_PAIRS)).method == "both"
    assert decide(evidence(text__tokens=MIN_TEXT_TOKENS)).method == "both"
    assert decide(evidence(situation__task="narrow", pairs__pairs=ENOUGH_PAIRS - 1)).method == "both"
    assert decide(evidence(text__bits_per_byte=1.04)).method == "both"  # known text, which holds the answers
    assert decide(evidence(general=None, pairs__found_in_text_share=0.0)).method == "both"  # unknown counts as news
    assert decide(evidence(text=None, general=None)).rule == "too little text"
    assert decide(evidence(pairs=None)).method == "unsupervised"
    hours = {"supervised": 7.0, "both": 10.0}
    assert decide(evidence(situation__max_device_hours=5.0, device_hours=hours)).method == "both"  # it is cut instead


def test_the_reason_and_the_factors_hold_the_numbers() -> None:
    few = evidence(pairs__pairs=50, pairs__common_answer_share=0.7)
    assert "50 pairs" in decide(few).because
    assert "2,000,000 tokens" in decide(few).because
    said = {factor.name: factor for factor in factors(few)}
    assert list(said) == [
        "data availability", "task specificity", "resources", "control against flexibility", "ethics"
    ]  # fmt: skip
    assert said["data availability"].speaks_for == "unsupervised"
    assert "0.100 [0.050, 0.150]" in said["task specificity"].numbers
    assert "is it narrow?" in said["task specificity"].risk
    assert "--hosts" in said["resources"].numbers
    assert "not answer" in said["control against flexibility"].risk
    assert "not known" in decide(evidence(general=None)).because


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pairs__pairs": ENOUGH_PAIRS - 1}, True),
        ({"pairs__pairs": ENOUGH_PAIRS}, False),
        ({"pairs__pairs": 50, "text__tokens": MIN_TEXT_TOKENS - 1}, False),
        ({"pairs__pairs": 50, "situation__sensitivity": "high"}, False),
    ],
)
def test_pairs_out_of_text_are_named_where_pairs_are_few_and_the_text_may_be_used(
    changes: dict[str, Any], named: bool
) -> None:
    said = {factor.name: factor for factor in factors(evidence(**changes))}
    assert ("dsft data bridge" in said["data availability"].risk) == named

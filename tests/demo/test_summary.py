from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsft.demo.answers import Scores
from dsft.demo.crash import Crash, TwiceTrained
from dsft.demo.run_config import PAIRS_SET, TEXT_SET
from dsft.demo.summary import Measured, judge, read_measurements
from dsft.errors import TrainingError

GOOD = (
    Measured("untrained", 0, 0, 3.7, 8.0),
    Measured("after raw text", 1, 10, 2.0, 7.0),
    Measured("after mixed", 2, 20, 1.9, 4.0),
    Measured("after instructions", 3, 30, 2.1, 3.0),
)
SCORES = Scores(10, 0.5, 0.1, {}, 0.2, 0.3, 0.25, 0.35)
CRASH = Crash(2, 1, 420, 400, (TwiceTrained(405, 3.5, 3.50001), TwiceTrained(410, 3.4, 3.4)))


def failed(
    measured: tuple[Measured, ...], scores: Scores = SCORES, bigram: float = 2.2, crash: Crash = CRASH
) -> list[int]:
    return [number for number, claim in enumerate(judge(measured, bigram, scores, crash)) if not claim.holds]


def test_a_good_run_passes() -> None:
    assert failed(GOOD) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("value", [2.2, 3.7, float("nan")])
def test_each_stage_must_beat_bigram_and_untrained(stage: int, value: float) -> None:
    measured = tuple(replace(m, text_bits_per_byte=value) if i == stage else m for i, m in enumerate(GOOD))
    assert failed(measured) == [stage - 1]
    assert failed(measured, bigram=9.0) == ([] if value == 2.2 else [stage - 1])


def test_the_last_stage_must_lower_the_response_loss() -> None:
    assert failed((*GOOD[:3], replace(GOOD[3], response_loss=4.0))) == [3]


def test_answers_must_beat_every_shuffle() -> None:
    assert failed(GOOD, replace(SCORES, shuffled_f1_max=0.5)) == [4]


@pytest.mark.parametrize("loss", [3.5005, float("nan")])
def test_steps_trained_again_must_have_the_same_loss(loss: float) -> None:
    assert failed(GOOD, crash=replace(CRASH, steps=(*CRASH.steps, TwiceTrained(415, 3.5, loss)))) == [5]


def write_metrics(path: Path, num_evaluations: int) -> None:
    records = [{"kind": "step", "step": 1, "loss": 1.0}]
    for i in range(num_evaluations):
        common = {"kind": "evaluation", "step": i, "tokens_trained": 10 * i}
        records.append({**common, "set": TEXT_SET, "bits_per_byte": 4.0 - i, "loss": 9.0})
        records.append({**common, "set": PAIRS_SET, "bits_per_byte": 0.0, "loss": 8.0 - i})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_measurements_are_read_in_order(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", 4)
    measured = read_measurements(tmp_path / "metrics.jsonl")
    assert [m.text_bits_per_byte for m in measured] == [4.0, 3.0, 2.0, 1.0]
    assert [m.response_loss for m in measured] == [8.0, 7.0, 6.0, 5.0]
    assert measured[0].name == "untrained"


def test_a_missing_evaluation_is_an_error(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", 3)
    with pytest.raises(TrainingError, match="3 evaluations"):
        read_measurements(tmp_path / "metrics.jsonl")

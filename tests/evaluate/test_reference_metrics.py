"""Scores equal those of the reference libraries, called as their documentation shows."""

from __future__ import annotations

import importlib.util
from pydoc_data.topics import topics

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from dsft.errors import ConfigError
from dsft.evaluate.reference_metrics import corpus_score, require_packages, rouge

REFERENCES = [text[:120] for _, text in sorted(topics.items())[:25]]
ANSWERS = [
    *(text[:60] + text[80:120] for text in REFERENCES[:20]),
    *("", "The", "an unrelated answer", REFERENCES[23], "Déjà vu — 日本"),
]


def test_rouge_equals_rouge_score() -> None:
    found = rouge(["rouge1", "rouge2", "rougeL"], ANSWERS, REFERENCES)
    for kind, values in found.items():
        scorer = rouge_scorer.RougeScorer([kind], use_stemmer=True)
        expected = [scorer.score(r, a)[kind].fmeasure for a, r in zip(ANSWERS, REFERENCES, strict=True)]
        assert values == pytest.approx(expected, abs=1e-9)
    assert found["rougeL"][23] == 1.0
    assert found["rouge1"][20] == 0.0


@pytest.mark.parametrize("kind", ["bleu", "chrf"])
def test_bleu_and_chrf_equal_sacrebleu(kind: str) -> None:
    value, (low, high) = corpus_score(kind, ANSWERS, REFERENCES)
    function = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[kind]
    assert value == pytest.approx(function(ANSWERS, [REFERENCES]).score, abs=1e-9)
    assert low < value < high
    assert corpus_score(kind, ANSWERS[:1], REFERENCES[:1])[1][0] == corpus_score(kind, ANSWERS[:1], REFERENCES[:1])[0]


def test_answers_without_a_common_word_have_a_score_too() -> None:
    assert corpus_score("bleu", ["q"] * 4, ["something else"] * 4) == (0.0, (0.0, 0.0))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages(["rouge1", "bleu"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else object())
    require_packages(["rouge1"])
    with pytest.raises(ConfigError, match=r"chrf needs the package sacrebleu.*dsft\[eval\]"):
        require_packages(["rouge1", "chrf"])

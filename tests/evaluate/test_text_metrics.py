"""Exact match and F1 against values computed by hand, and against a second implementation written from the paper."""

from __future__ import annotations

import random
import re
import string

import pytest

from dsft.evaluate.text_metrics import exact_match, normalize_answer, shuffled_f1, token_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("a an the", ""),
        ("U.S.A.", "usa"),
        ("theatre and another", "theatre and another"),
        ("the-cat", "thecat"),  # punctuation goes first, so the article is no word any more (as in the benchmark)
        ("Ärger\tüber\nall", "ärger über all"),
    ],
)
def test_normalisation_by_hand(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "match"),
    [
        ("the cat sat", "A cat sat.", 1.0, 1.0),
        ("cat", "cat sat", 2 / 3, 0.0),  # precision 1, recall 1/2
        ("cat cat cat", "cat sat", 2 / 5, 0.0),  # one in common of 3 and of 2
        ("dog", "cat", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("the", "", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
        ("b c d e", "c d f", 4 / 7, 0.0),  # precision 2/4, recall 2/3
    ],
)
def test_scores_by_hand(answer: str, reference: str, f1: float, match: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert exact_match(answer, reference) == match


def _second_f1(answer: str, reference: str) -> float:
    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return [word for word in re.sub(r"\b(a|an|the)\b", " ", kept).split() if word]

    left, right = words(answer), words(reference)
    if not left or not right:
        return 1.0 if left == right else 0.0
    pool, common = list(right), 0
    for word in left:
        if word in pool:
            pool.remove(word)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(left), common / len(right)
    return 2 * precision * recall / (precision + recall)


def test_f1_equals_precision_recall_form_on_random_texts() -> None:
    generator = random.Random(7)
    vocabulary = ["the", "a", "cat", "Cat", "sat.", "on", "mat", "-", "an", "x", "y,", "z!"]
    for _ in range(2000):
        answer = " ".join(generator.choices(vocabulary, k=generator.randrange(8)))
        reference = " ".join(generator.choices(vocabulary, k=generator.randrange(8)))
        assert token_f1(answer, reference) == pytest.approx(_second_f1(answer, reference))


def test_shuffled_answers_never_meet_their_own_reference() -> None:
    answers = [f"word{i}" for i in range(5)]
    assert shuffled_f1(answers, answers, seed=3) == 0.0
    assert shuffled_f1(["same"] * 4, ["same"] * 4, seed=3) == 1.0
    assert shuffled_f1(["alone"], ["alone"], seed=3) == 0.0
    mixed = ["red car", "red bus", "blue bus", "red"]
    assert shuffled_f1(mixed, mixed, seed=3) == shuffled_f1(mixed, mixed, seed=3)
    assert 0.0 < shuffled_f1(mixed, mixed, seed=3) < 1.0

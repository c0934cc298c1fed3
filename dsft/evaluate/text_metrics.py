"""Exact match and token F1 of a generated answer against its reference.

The definitions are those of the SQuAD benchmark's official evaluation (Rajpurkar et al. 2016, "SQuAD: 100,000+
Questions for Machine Comprehension of Text", section 6.1): lower case, no punctuation, no English articles, single
spaces; F1 over the bag of remaining words. Two empty answers agree (1.0), an empty one and another do not (0.0).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, then without ASCII punctuation, then without articles, then single spaces."""
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """1.0 if both are the same text after :func:`normalize_answer`, else 0.0."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the multisets of normalised words, in [0, 1]."""
    answer_words, reference_words = normalize_answer(answer).split(), normalize_answer(reference).split()
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    num_common = sum((Counter(answer_words) & Counter(reference_words)).values())
    return 2.0 * num_common / (len(answer_words) + len(reference_words))


def shuffled_f1(answers: Sequence[str], references: Sequence[str], seed: int, num_shuffles: int = 8) -> float:
    """Mean F1 of the same answers against other questions' references: what fluency alone scores.

    Each shuffle pairs answer i with the reference of another question, by a rotation of a random order (so that no
    answer ever meets its own reference). With fewer than two answers there is no other question: 0.0.
    """
    num_answers = len(answers)
    if num_answers < 2:
        return 0.0
    generator = np.random.default_rng([seed, 0x5F1])
    total = 0.0
    for _ in range(num_shuffles):
        order = generator.permutation(num_answers)
        total += sum(token_f1(answers[a], references[b]) for a, b in zip(order, np.roll(order, 1), strict=True))
    return total / (num_shuffles * num_answers)

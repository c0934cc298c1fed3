from __future__ import annotations

import random

import numpy as np
import pytest

from dsft.corpus.near_duplicates import SHINGLE_WORDS, count_copies, minima, near_copies, ngram_hashes, text_hash


def text(seed: int, num_words: int = 300) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(5000)}" for _ in range(num_words)]


def jaccard(first: list[str], second: list[str]) -> float:
    """Of the sets of runs of five words, counted by hand."""
    runs = [{tuple(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - 4)} for words in (first, second)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


@pytest.mark.parametrize("num_changed", [0, 1, 5, 15, 40])
def test_equal_minima_estimate_the_jaccard_index(num_changed: int) -> None:
    errors = []
    for seed in range(12):
        first = text(seed)
        second = list(first)
        for at in random.Random(seed + 100).sample(range(len(first)), num_changed):
            second[at] = "other"
        estimate = (minima(" ".join(first)) == minima(" ".join(second))).mean()
        errors.append(estimate - jaccard(first, second))
    assert abs(np.mean(errors)) < 0.04, "four standard errors of 12 * 128 minima"


def test_near_copies_are_found_and_others_are_not() -> None:
    texts = [" ".join(text(seed)) for seed in range(40)]
    near = text(3)
    near[100] = near[200] = "changed"
    texts += [" ".join(near), texts[5], f"  {texts[6]}\n"]
    hashes = np.array([text_hash(one) for one in texts], dtype=np.int64)
    found = near_copies(np.array([minima(one) for one in texts]), hashes, 0.8)
    assert np.flatnonzero(found).tolist() == [40]
    assert count_copies(hashes) == 2


def test_nothing_at_all() -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert near_copies(np.zeros((0, 128), dtype=np.uint32), empty, 0.8).tolist() == []
    assert count_copies(empty) == 0


def test_ngrams_do_not_see_case_space_and_punctuation() -> None:
    first, second = ngram_hashes("One two,\nTHREE four.", 3), ngram_hashes("one  two three four five", 3)
    assert first.tolist() == second[:2].tolist()
    assert len(set(second.tolist())) == 3
    assert len(ngram_hashes("one two", 3)) == 0
    assert ngram_hashes("a b a", 2)[0] != ngram_hashes("b a b", 2)[0]


def test_short_texts_are_compared_as_a_whole() -> None:
    assert np.array_equal(minima("Yes, it is."), minima("yes it is"))
    assert (minima("yes it is") == minima("no it is")).mean() < 0.1

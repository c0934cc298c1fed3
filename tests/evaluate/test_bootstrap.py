"""Intervals against the normal approximation, and coverage on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from dsft.evaluate.bootstrap import difference, interval


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = interval(values, None, seed=1, purpose="x")
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for number in range(200):
        values = generator.normal(0.0, 1.0, 60)
        low, high = interval(values, None, seed=number, purpose="x")
        covered += low <= 0.0 <= high
    assert 178 <= covered <= 198  # 95 % of 200 is 190; the percentile interval of 60 values covers a little less


def test_documents_are_drawn_whole() -> None:
    """A ratio over one document does not vary, however many tokens it has."""
    assert interval([7.0], [3.0], seed=1, purpose="x") == (7 / 3, 7 / 3)
    with_empty = interval([7.0, 0.0], [3.0, 0.0], seed=1, purpose="x")  # resamples of only empty documents are left out
    assert with_empty == (7 / 3, 7 / 3)


def test_draws_come_from_seed_and_purpose() -> None:
    values = np.arange(30.0)
    first = interval(values, None, seed=1, purpose="x")
    assert first == interval(values, None, seed=1, purpose="x")
    assert first != interval(values, None, seed=2, purpose="x")
    assert first != interval(values, None, seed=1, purpose="y")


def test_a_paired_comparison_sees_what_two_intervals_cannot() -> None:
    """Documents differ much, the models by a constant: paired, the difference is sure; unpaired, they overlap."""
    generator = np.random.default_rng(2)
    tokens = generator.integers(10, 50, 100).astype(float)
    nll = tokens * generator.uniform(1.0, 5.0, 100)
    better = nll - 0.05 * tokens
    found = difference((nll, tokens), (better, tokens), seed=1, purpose="x")
    assert found.value == pytest.approx(-0.05)
    assert found.low == pytest.approx(-0.05)
    assert found.is_significant
    low, high = interval(nll, tokens, seed=1, purpose="x")
    assert high - low > 0.2
    same = difference((nll, tokens), (nll, tokens), seed=1, purpose="x")
    assert (same.value, same.low, same.high, same.is_significant) == (0.0, 0.0, 0.0, False)

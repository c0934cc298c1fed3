"""Intervals of evaluation scores by the bootstrap over documents, and the paired comparison of two models.

Percentile intervals (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13). A document is the unit
that is drawn: tokens of one document are not independent. Draws depend on the seed and on what is measured, so that two
models measured on the same documents are resampled alike.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 1000
LEVEL = 0.95
_CELLS = 4_000_000
"""Drawn indices that exist at once."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How two models differ on the same documents.

    Attributes:
        value: score of the second minus score of the first.
        low, high: 95 % interval of it. The models differ where it does not contain 0.
    """

    value: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """The interval does not contain 0."""
        return self.low > 0.0 or self.high < 0.0


def interval(
    numerators: npt.ArrayLike, denominators: npt.ArrayLike | None, *, seed: int, purpose: str
) -> tuple[float, float]:
    """95 % interval of ``sum(numerators) / sum(denominators)`` over resampled documents.

    Args:
        denominators: None: all 1, so that the ratio is the mean.
        purpose: what is measured; part of the draws' seed.
    """
    draws = _ratios(_columns(numerators, denominators), seed, purpose)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def difference(
    first: tuple[npt.ArrayLike, npt.ArrayLike | None],
    second: tuple[npt.ArrayLike, npt.ArrayLike | None],
    *,
    seed: int,
    purpose: str,
) -> Difference:
    """Paired comparison of two ratios over the same documents, each given as (numerators, denominators)."""
    a, b = _columns(*first), _columns(*second)
    assert a.shape == b.shape, "a paired comparison needs the same documents"
    draws = _ratios(b, seed, purpose) - _ratios(a, seed, purpose)  # the same documents are drawn for both
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    totals = [math.fsum(columns[0]) / math.fsum(columns[1]) for columns in (a, b)]
    return Difference(totals[1] - totals[0], float(low), float(high))


def _columns(numerators: npt.ArrayLike, denominators: npt.ArrayLike | None) -> npt.NDArray[np.float64]:
    """float64[2, n]."""
    values = np.asarray(numerators, np.float64)
    return np.stack([values, np.ones_like(values) if denominators is None else np.asarray(denominators, np.float64)])


def _ratios(columns: npt.NDArray[np.float64], seed: int, purpose: str) -> npt.NDArray[np.float64]:
    """One ratio of sums a resample; a resample without any denominator (only empty documents) is left out."""
    digest = hashlib.blake2b(f"{seed}/bootstrap/{purpose}".encode(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    num_documents = columns.shape[1]
    at_once = max(1, _CELLS // max(num_documents, 1))
    sums = []
    for first in range(0, NUM_RESAMPLES, at_once):
        drawn = generator.integers(0, num_documents, (min(at_once, NUM_RESAMPLES - first), num_documents))
        sums.append(columns[:, drawn].sum(-1))
    numerators, denominators = np.concatenate(sums, axis=1)
    used = denominators > 0
    ratios: npt.NDArray[np.float64] = numerators[used] / denominators[used]
    return ratios

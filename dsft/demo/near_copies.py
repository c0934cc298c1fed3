"""Finds texts that are, for a large part, already in a collection: shared shingles (runs of five words).

The measure is containment, the share of a text's own shingles that occur anywhere in the collection. It is stricter
than the Jaccard index with any single document (Broder, "On the resemblance and containment of documents", 1997): a
text put together from pieces of several documents is found too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

_SHINGLE_WORDS = 5
_MAX_CONTAINMENT = 0.25
_MIX = np.uint64(0x9E3779B97F4A7C15)


class NearCopies:
    """The shingles of a collection of texts.

    Args:
        texts: the collection. Case, white space and punctuation do not count.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}
        self._shingles = np.unique(np.concatenate([self._hashes(text) for text in texts]))

    def containment(self, text: str) -> float:
        """Share of the text's shingles, in [0, 1], that are in the collection; 0 for a text under five words."""
        hashes = np.unique(self._hashes(text))
        if not len(hashes):
            return 0.0
        found = np.searchsorted(self._shingles, hashes)
        found[found == len(self._shingles)] = 0
        return float(np.mean(self._shingles[found] == hashes))

    def contains(self, text: str) -> bool:
        """Whether the text is a near-copy: more than a quarter of its shingles are in the collection."""
        return self.containment(text) > _MAX_CONTAINMENT

    def _hashes(self, text: str) -> npt.NDArray[np.uint64]:
        """uint64[max(0, words - 4)], one hash a shingle."""
        words = np.fromiter(self._word_numbers(text), np.uint64)
        count = max(0, len(words) - _SHINGLE_WORDS + 1)
        hashes = np.zeros(count, np.uint64)
        for offset in range(_SHINGLE_WORDS):
            hashes = (hashes ^ words[offset : offset + count]) * _MIX
            hashes ^= hashes >> np.uint64(29)
        return hashes

    def _word_numbers(self, text: str) -> Iterator[int]:
        for word in re.findall(r"\w+", text.lower()):
            yield self._numbers.setdefault(word, len(self._numbers))

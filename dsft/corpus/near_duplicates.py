"""Texts as hashes: exact copies, near-copies by MinHash, and word n-grams that two collections share.

MinHash: Broder, "On the resemblance and containment of documents", 1997. The share of equal minima of two texts
estimates the Jaccard index of their shingles; bands of minima find the pairs worth comparing (Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", chapter 3).
"""

from __future__ import annotations

import hashlib
import re
import zlib

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

SHINGLE_WORDS = 5
NUM_MINIMA, BAND_ROWS = 128, 4
"""32 bands of 4 minima: a pair with a Jaccard index of 0.8 is found with probability 1 - (1 - 0.8^4)^32 > 0.9999999."""


def _mix(values: UInt64) -> UInt64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), elementwise: a bijection of uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SALTS = _mix(np.arange(1, NUM_MINIMA + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
_WORD = re.compile(r"\w+")


def ngram_hashes(text: str, num_words: int) -> UInt64:
    """A 64-bit hash of every run of ``num_words`` words, uint64[max(0, words - num_words + 1)]. Case, white space and
    punctuation do not count."""
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], dtype=np.uint64)
    count = max(0, len(words) - num_words + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(num_words if count else 0):
        hashes = _mix(hashes ^ (words[offset : offset + count] + np.uint64(offset + 1)))
    return hashes


def shares_any(values: UInt64, known: UInt64) -> bool:
    """Whether one of ``values`` is among the sorted ``known``."""
    if not len(known) or not len(values):
        return False
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return bool((known[at] == values).any())


def text_hash(text: str) -> int:
    """63-bit hash of a text; white space at its ends does not count."""
    digest = hashlib.blake2b(text.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def minima(text: str) -> npt.NDArray[np.uint32]:
    """The MinHash signature of a text, uint32[128]. A text shorter than a shingle is one shingle."""
    shingles = ngram_hashes(text, SHINGLE_WORDS)
    if not len(shingles):
        shingles = np.array([text_hash(" ".join(_WORD.findall(text.lower())))], dtype=np.uint64)
    lowest = np.full(NUM_MINIMA, 2**64 - 1, dtype=np.uint64)
    for begin in range(0, len(shingles), 1024):  # bounds the memory of a long text
        block = _mix(shingles[begin : begin + 1024, None] ^ _SALTS)
        lowest = np.minimum(lowest, block.min(axis=0))
    return (lowest >> np.uint64(32)).astype(np.uint32)


def count_copies(hashes: npt.NDArray[np.int64]) -> int:
    """Texts that are exactly an earlier one."""
    return len(hashes) - len(np.unique(hashes))


def near_copies(
    signatures: npt.NDArray[np.uint32], hashes: npt.NDArray[np.int64], min_jaccard: float
) -> npt.NDArray[np.bool_]:
    """Which texts are near-copies, but no exact ones, of an earlier text.

    Each text is compared with the first one of each of its bands.

    Args:
        signatures: uint32[N, 128], from :func:`minima`.
        hashes: int64[N], from :func:`text_hash`.
        min_jaccard: least estimated Jaccard index of a near-copy.

    Returns:
        bool[N].
    """
    found = np.zeros(len(signatures), dtype=np.bool_)
    bands = np.ascontiguousarray(signatures).view(f"V{4 * BAND_ROWS}").reshape(-1, NUM_MINIMA // BAND_ROWS)
    for band in range(bands.shape[1] if len(signatures) else 0):
        _, first, inverse = np.unique(bands[:, band], return_index=True, return_inverse=True)
        earlier = first[inverse]
        rows = np.flatnonzero((earlier < np.arange(len(earlier))) & (hashes[earlier] != hashes) & ~found)
        alike = (signatures[rows] == signatures[earlier[rows]]).mean(axis=1)
        found[rows[alike >= min_jaccard]] = True
    return found

"""Keyed permutations of ``[0, n)`` that need no array, and the keys they are made from.

A permutation is a Feistel network over pairs ``(left, right)`` of digits in base ``ceil(sqrt(n))``, with cycle walking:
a value that leaves ``[0, n)`` goes through the network again (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). The domain is at most ``n + 2 sqrt(n) + 1`` wide, so that walking is rare. Nothing is stored:
position 7,000,000,000 of 10^10 costs as much as position 0.
"""

from __future__ import annotations

import hashlib
import json
from math import isqrt

import numpy as np
import numpy.typing as npt

from dsft.ops import backend, planning

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_NUM_ROUNDS = 6


def stream_key(seed: int, purpose: str, name: str = "") -> int:
    """64-bit key of one stream of randomness. Different (seed, purpose, name) give unrelated keys."""
    text = json.dumps([seed, purpose, name])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def derive_key(key: int, *numbers: int) -> int:
    """Key of position ``numbers`` in the stream ``key`` (splitmix64 over the numbers, in order)."""
    for number in numbers:
        mixed = (key + _GOLDEN * (number + 1)) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & _MASK
        key = mixed ^ (mixed >> 31)
    return key


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), elementwise: a bijection of uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A pseudo-random bijection of ``[0, size)``, decided by ``(size, key)`` alone.

    Args:
        size: 0 <= size < 2**62.
        key: 64-bit key, see :func:`stream_key` and :func:`derive_key`.

    Attributes:
        base: number of digits of the pairs; round_keys: uint64[6].
    """

    def __init__(self, size: int, key: int) -> None:
        assert 0 <= size < 2**62, size
        self.size = size
        self.base = isqrt(max(size - 1, 0)) + 1
        self.round_keys = np.array([derive_key(key, number) for number in range(_NUM_ROUNDS)], dtype=np.uint64)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each of ``positions`` (int64[N], in ``[0, size)``) goes: int64[N]."""
        if backend.current() == "native":
            return planning.permute(self.size, self.base, self.round_keys, positions)
        return self.permute_reference(positions)

    def permute_reference(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """As :meth:`__call__`, in numpy."""
        values = self._network(positions.astype(np.uint64))
        while (outside := np.flatnonzero(values >= np.uint64(self.size))).size:
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        half = np.uint64(32)
        base = np.uint64(self.base)
        left, right = np.divmod(values, base)
        for round_key in self.round_keys:
            # The high half of the hash, scaled to [0, base) by a multiplication instead of a division.
            shift = ((mix64(right ^ round_key) >> half) * base) >> half
            left += shift
            left -= base * (left >= base)
            left, right = right, left
        return left * base + right

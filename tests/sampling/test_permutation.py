from __future__ import annotations

from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.sampling.permutation import Permutation, derive_key, mix64, stream_key


@settings(max_examples=150, deadline=None)
@given(size=st.integers(0, 5000), key=st.integers(0, 2**64 - 1))
def test_is_a_bijection(size: int, key: int) -> None:
    image = Permutation(size, key)(np.arange(size, dtype=np.int64))
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [65_536, 65_537, 1_000_003])
def test_is_a_bijection_at_sizes_of_real_groups(size: int) -> None:
    image = Permutation(size, 7)(np.arange(size, dtype=np.int64))
    assert np.array_equal(np.bincount(image, minlength=size), np.ones(size))


@pytest.mark.parametrize("size", [10**10, 2**40 + 1, 2**62 - 1])
def test_huge_sizes_stay_inside_and_do_not_collide(size: int) -> None:
    positions = np.concatenate([np.arange(50_000), size - 1 - np.arange(50_000)]).astype(np.int64)
    image = Permutation(size, 3)(positions)
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == len(positions)


def test_a_position_does_not_depend_on_the_others_asked() -> None:
    permutation = Permutation(1000, 5)
    whole = permutation(np.arange(1000, dtype=np.int64))
    parts = [permutation(np.array([position], dtype=np.int64))[0] for position in range(0, 1000, 37)]
    assert parts == whole[::37].tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_of_few_elements_is_about_equally_likely(size: int) -> None:
    num_keys = 4000
    orders = Counter(
        tuple(Permutation(size, derive_key(1, key))(np.arange(size, dtype=np.int64)).tolist())
        for key in range(num_keys)
    )
    assert len(orders) == factorial(size)
    expected = num_keys / factorial(size)
    chi_squared = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_squared < factorial(size) - 1 + 5 * np.sqrt(2 * factorial(size))


def test_images_are_uniform_and_neighbours_are_unrelated() -> None:
    """Chi-squared of (position, image) over keys, and the correlation of consecutive images, as for random shuffles."""
    size, num_keys = 23, 3000
    images = np.array(
        [Permutation(size, derive_key(9, key))(np.arange(size, dtype=np.int64)) for key in range(num_keys)]
    )
    counts = np.array([np.bincount(images[:, position], minlength=size) for position in range(size)])
    expected = num_keys / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)
    large = Permutation(100_000, 1)(np.arange(100_000, dtype=np.int64)).astype(np.float64)
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 5 / np.sqrt(len(large))
    assert abs(np.corrcoef(large, np.arange(len(large)))[0, 1]) < 5 / np.sqrt(len(large))


def test_keys_differ_by_every_part_and_never_change() -> None:
    keys = {
        stream_key(1, "a", "b"),
        stream_key(2, "a", "b"),
        stream_key(1, "b", "a"),
        stream_key(1, "ab"),
        stream_key(1, "a"),
    }
    assert len(keys) == 5
    assert len({derive_key(1, 2, 3), derive_key(1, 3, 2), derive_key(1, 2), derive_key(2, 2, 3), derive_key(1, 0)}) == 5
    # Written down once: another value means another data order, so ORDER_VERSION must rise with it.
    assert stream_key(17, "shards", "wiki") == 0xF57DC7DFB1461A62
    assert derive_key(17, 1, 2) == 0x8E4CE559D2B7E95D
    assert Permutation(10, 17)(np.arange(10, dtype=np.int64)).tolist() == [8, 7, 5, 1, 3, 0, 9, 4, 2, 6]


def test_mixing_is_splitmix64() -> None:
    """First outputs of splitmix64 from seed 1234567, as its author's C code gives them."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + golden * (i + 1)) % 2**64 for i in range(3)], dtype=np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix64(states).tolist() == expected
    assert derive_key(1234567, 0) == expected[0]

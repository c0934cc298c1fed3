from __future__ import annotations

from math import ceil

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.sampling.packing import best_fit_decreasing, planned_lengths, reorder_packs, split_documents


def naive_best_fit_decreasing(lengths: list[int], pack_tokens: int) -> list[list[int]]:
    """The textbook algorithm, one piece at a time over all packs; ties as dsft's docstring says."""
    packs: list[list[int]] = []
    spaces: list[int] = []
    reached: list[int] = []  # when a pack got to its space
    for time, piece in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [pack for pack in range(len(packs)) if spaces[pack] >= lengths[piece]]
        if fitting:
            pack = min(fitting, key=lambda p: (spaces[p], -reached[p]))
        else:
            pack = len(packs)
            packs.append([])
            spaces.append(pack_tokens)
            reached.append(0)
        packs[pack].append(piece)
        spaces[pack] -= lengths[piece]
        reached[pack] = time
    return packs


def as_lists(lengths: npt.NDArray[np.int32], pack_tokens: int) -> list[list[int]]:
    packing = best_fit_decreasing(lengths, pack_tokens)
    return [part.tolist() for part in np.split(packing.pieces, packing.offsets[1:-1])] if len(lengths) else []


@st.composite
def piece_lengths(draw: st.DrawFn) -> tuple[npt.NDArray[np.int32], int]:
    pack_tokens = draw(st.integers(1, 200))
    lengths = draw(st.lists(st.integers(1, pack_tokens), max_size=150))
    return np.array(lengths, dtype=np.int32), pack_tokens


@settings(max_examples=300, deadline=None)
@given(piece_lengths())
def test_equals_the_textbook_algorithm(case: tuple[npt.NDArray[np.int32], int]) -> None:
    lengths, pack_tokens = case
    assert as_lists(lengths, pack_tokens) == naive_best_fit_decreasing(lengths.tolist(), pack_tokens)


@settings(max_examples=200, deadline=None)
@given(piece_lengths())
def test_every_piece_once_and_no_pack_too_long(case: tuple[npt.NDArray[np.int32], int]) -> None:
    lengths, pack_tokens = case
    packing = best_fit_decreasing(lengths, pack_tokens)
    assert np.array_equal(np.sort(packing.pieces), np.arange(len(lengths)))
    totals = [int(lengths[pack].sum()) for pack in as_lists(lengths, pack_tokens)]
    assert all(0 < total <= pack_tokens for total in totals)
    lower_bound = ceil(int(lengths.sum()) / pack_tokens)
    assert len(totals) <= 11 / 9 * max(lower_bound, int((lengths > pack_tokens / 2).sum())) * 1.5 + 1


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    pack_tokens=st.integers(1, 700),
    overlong=st.sampled_from(["split", "truncate", "drop"]),
)
def test_every_token_is_in_one_piece_or_counted_as_lost(lengths: list[int], pack_tokens: int, overlong: str) -> None:
    column = np.array(lengths, dtype=np.int32)
    planned = planned_lengths(column, pack_tokens, overlong)  # type: ignore[arg-type]
    kept = np.flatnonzero(planned)
    document, start, length = split_documents(planned[kept], pack_tokens)
    covered = [np.zeros(n, dtype=int) for n in lengths]
    for row, first, count in zip(kept[document], start, length, strict=True):
        assert 1 <= count <= pack_tokens
        covered[row][first : first + count] += 1
    for row, n in enumerate(lengths):
        if n <= pack_tokens or overlong == "split":
            assert (covered[row] == 1).all()
        elif overlong == "truncate":
            assert covered[row].tolist() == [1] * pack_tokens + [0] * (n - pack_tokens)
        else:
            assert not covered[row].any()
    assert int((column - planned).sum()) + int(length.sum()) == sum(lengths)


@pytest.mark.parametrize(("pack_tokens", "mean"), [(8192, 700), (5000, 700), (2048, 350)])
def test_density_of_a_window_of_lognormal_documents(pack_tokens: int, mean: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, 65_536), 8, pack_tokens).astype(np.int32)
    num_packs = len(best_fit_decreasing(lengths, pack_tokens).offsets) - 1
    assert int(lengths.sum()) / (num_packs * pack_tokens) > 0.999


def test_reordering_keeps_the_packs() -> None:
    packing = best_fit_decreasing(np.array([5, 4, 3, 3, 2, 9], dtype=np.int32), 9)
    before = [part.tolist() for part in np.split(packing.pieces, packing.offsets[1:-1])]
    shuffled = reorder_packs(packing, np.array([2, 0, 1], dtype=np.int64))
    after = [part.tolist() for part in np.split(shuffled.pieces, shuffled.offsets[1:-1])]
    assert after == [before[2], before[0], before[1]]

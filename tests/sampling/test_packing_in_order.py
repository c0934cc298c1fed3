"""Next-fit and concat-and-split: what keeps the order of the documents drawn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.ops import backend
from dsft.ops.backend import Backend
from dsft.sampling.packing import Overlong, concat_and_split, next_fit, planned_lengths, split_documents

DOCUMENTS = st.lists(st.integers(1, 300), max_size=60).map(lambda lengths: np.array(lengths, dtype=np.int32))
BACKENDS = st.sampled_from(["native", "reference"])


@pytest.fixture(autouse=True, scope="module")
def _native_again() -> object:
    yield
    backend.choose("native")


def tokens_of(
    document: npt.NDArray[np.int64], start: npt.NDArray[np.int64], length: npt.NDArray[np.int32]
) -> list[tuple[int, int]]:
    """(document, token) of everything in the pieces, in their order."""
    pieces = zip(document.tolist(), start.tolist(), length.tolist(), strict=True)
    return [(d, token) for d, first, count in pieces for token in range(first, first + count)]


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, pack_tokens=st.integers(1, 120), kernels=BACKENDS)
def test_next_fit_closes_a_pack_only_where_the_next_piece_has_no_room(
    documents: npt.NDArray[np.int32], pack_tokens: int, kernels: Backend
) -> None:
    backend.choose(kernels)
    document, start, length = split_documents(documents, pack_tokens)
    packing = next_fit(length, pack_tokens)
    assert packing.pieces.tolist() == list(range(len(length)))
    packs = [length[begin:end].tolist() for begin, end in pairwise(packing.offsets.tolist())]
    assert packing.offsets[0] == 0
    assert packing.offsets[-1] == len(length)
    assert all(0 < sum(pack) <= pack_tokens for pack in packs)
    assert all(sum(pack) + after[0] > pack_tokens for pack, after in pairwise(packs))
    assert tokens_of(document, start, length) == [(d, t) for d, n in enumerate(documents.tolist()) for t in range(n)]


@settings(max_examples=200, deadline=None)
@given(
    documents=DOCUMENTS,
    pack_tokens=st.integers(1, 120),
    overlong=st.sampled_from(["split", "truncate", "drop"]),
    kernels=BACKENDS,
)
def test_concat_and_split_fills_every_pack_and_has_every_token_once_or_counted_as_lost(
    documents: npt.NDArray[np.int32], pack_tokens: int, overlong: Overlong, kernels: Backend
) -> None:
    backend.choose(kernels)
    planned = planned_lengths(documents, pack_tokens, overlong)
    kept = planned[planned > 0]
    document, start, length, packing = concat_and_split(kept, pack_tokens)
    assert tokens_of(document, start, length) == [(d, t) for d, n in enumerate(kept.tolist()) for t in range(n)]
    assert packing.pieces.tolist() == list(range(len(length)))
    packs = [length[begin:end].tolist() for begin, end in pairwise(packing.offsets.tolist())]
    assert [sum(pack) for pack in packs[:-1]] == [pack_tokens] * (len(packs) - 1)
    assert all(0 < sum(pack) <= pack_tokens for pack in packs)
    assert len(packs) == -(-int(kept.sum()) // pack_tokens)
    assert len(length) <= len(kept) + max(0, len(packs) - 1)  # no piece ends but with its document or its pack
    assert int((documents - planned).sum()) + int(length.sum()) == int(documents.sum())


def test_concat_and_split_by_hand() -> None:
    document, start, length, packing = concat_and_split(np.array([3, 4, 9, 2], dtype=np.int32), 5)
    assert list(zip(document.tolist(), start.tolist(), length.tolist(), strict=True)) == [
        (0, 0, 3), (1, 0, 2),
        (1, 2, 2), (2, 0, 3),
        (2, 3, 5),
        (2, 8, 1), (3, 0, 2),
    ]  # fmt: skip
    assert packing.offsets.tolist() == [0, 2, 4, 5, 7]


def test_next_fit_by_hand() -> None:
    assert next_fit(np.array([3, 2, 1, 5, 4, 2], dtype=np.int32), 5).offsets.tolist() == [0, 2, 3, 4, 5, 6]

"""Weights of supervised rows against an enumeration of each document's tokens, both implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.errors import KernelError
from dsft.ops import backend
from dsft.ops.loss_mask import expand_loss_mask
from dsft.ops.reference import LOSS_REDUCTIONS, LossReduction, expand_loss_mask_reference

Implementation = Callable[..., tuple[torch.Tensor, torch.Tensor]]
both = pytest.mark.parametrize("implementation", [expand_loss_mask, expand_loss_mask_reference])


@pytest.fixture(autouse=True)
def _native() -> None:
    backend.choose("native")


@dataclass(frozen=True)
class Piece:
    """``start`` and ``targets`` of a piece, and its whole document."""

    spans: tuple[tuple[int, int, float], ...]
    start: int
    targets: int
    document_tokens: int
    weight: float = 1.0


def arguments(pieces: list[Piece], reduction: LossReduction, num_rows: int | None = None) -> tuple[object, ...]:
    spans = [span for piece in pieces for span in piece.spans]
    return (
        torch.tensor([span[:2] for span in spans], dtype=torch.int32).reshape(-1, 2),
        torch.tensor([span[2] for span in spans], dtype=torch.float32),
        torch.tensor(np.cumsum([0, *(len(piece.spans) for piece in pieces)]), dtype=torch.int64),
        torch.tensor([piece.start for piece in pieces], dtype=torch.int64),
        torch.tensor([piece.targets for piece in pieces], dtype=torch.int64),
        torch.tensor([piece.document_tokens for piece in pieces], dtype=torch.int64),
        torch.tensor([piece.weight for piece in pieces], dtype=torch.float64),
        reduction,
        num_rows,
    )


def by_tokens(pieces: list[Piece], reduction: LossReduction) -> list[list[tuple[int, float]]]:
    """Per piece (target inside it, weight), token by token."""
    found = []
    for piece in pieces:
        owner = {
            token: number
            for number, (begin, end, weight) in enumerate(piece.spans)
            for token in range(begin, end)
            if weight > 0 and 1 <= token < piece.document_tokens
        }
        of_piece = []
        for token, number in sorted(owner.items()):
            divisor = {"token": 1, "document": len(owner), "message": list(owner.values()).count(number)}[reduction]
            weight = float(np.float32(float(np.float32(piece.spans[number][2])) * piece.weight / divisor))
            if weight > 0 and 1 <= token - piece.start < piece.targets:
                of_piece.append((token - piece.start, weight))
        found.append(of_piece)
    return found


def found_rows(pieces: list[Piece], clipped: torch.Tensor, row_weight: torch.Tensor) -> list[list[tuple[int, float]]]:
    weights = iter(row_weight.tolist())
    borders = np.cumsum([0, *(len(piece.spans) for piece in pieces)]).tolist()
    rows = [
        [(target, next(weights)) for begin, end in clipped[first:last].tolist() for target in range(begin, end)]
        for first, last in pairwise(borders)
    ]
    assert next(weights, None) is None
    return rows


@st.composite
def documents(draw: st.DrawFn) -> Piece:
    tokens = draw(st.integers(1, 30))
    borders = sorted(draw(st.sets(st.integers(0, tokens + 2), max_size=8)))
    weights = st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e-30])
    pairs = zip(borders[::2], borders[1::2], strict=False)
    spans = tuple((begin, end, draw(weights)) for begin, end in pairs)
    start = draw(st.integers(0, tokens - 1))
    targets = draw(st.integers(1, tokens - start))
    return Piece(spans, start, targets, tokens, draw(st.sampled_from([1.0, 0.0, 0.7, 1e-20])))


@settings(max_examples=300, deadline=None)
@given(st.lists(documents(), max_size=5), st.sampled_from(LOSS_REDUCTIONS))
def test_equals_a_count_of_tokens(pieces: list[Piece], reduction: LossReduction) -> None:
    expected = by_tokens(pieces, reduction)
    case = arguments(pieces, reduction)
    clipped, row_weight = expand_loss_mask(*case)  # type: ignore[arg-type]
    assert (clipped.dtype, row_weight.dtype) == (torch.int32, torch.float32)
    assert found_rows(pieces, clipped, row_weight) == expected
    for found, wanted in zip(expand_loss_mask_reference(*case), (clipped, row_weight), strict=True):  # type: ignore[arg-type]
        assert torch.equal(found, wanted)


@both
@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.tuples(documents(), st.integers(0, 2)), min_size=1, max_size=8))
def test_a_source_is_normalised_by_its_pieces_weight(
    implementation: Implementation, pieces: list[tuple[Piece, int]]
) -> None:
    """Over ranks: each counts its weights by source (``token``), the sums travel, and each source then weighs one."""
    alone = [replace(piece, weight=1.0) for piece, _ in pieces]
    _, counted = implementation(*arguments(alone, "token"))
    rows = [len(of_piece) for of_piece in by_tokens(alone, "token")]
    source = np.repeat([number for _, number in pieces], rows)
    sums = np.bincount(source, weights=counted.double().numpy(), minlength=3)
    weights = [1 / sums[number] if sums[number] else 0.0 for _, number in pieces]
    scaled = [replace(piece, weight=weight) for piece, weight in zip(alone, weights, strict=True)]
    _, weighed = implementation(*arguments(scaled, "token"))
    assert len(weighed) == len(counted)
    found = np.bincount(source, weights=weighed.double().numpy(), minlength=3)
    np.testing.assert_allclose(found[sums > 0], 1, rtol=1e-6)


DOCUMENT = Piece(((0, 3, 1.0), (5, 6, 2.0), (8, 12, 0.5)), 0, 12, 12)


@pytest.mark.parametrize(
    ("reduction", "weights"),
    [
        ("token", [1.0, 1.0, 2.0, 0.5, 0.5, 0.5, 0.5]),
        ("document", [1 / 7, 1 / 7, 2 / 7, 0.5 / 7, 0.5 / 7, 0.5 / 7, 0.5 / 7]),
        ("message", [0.5, 0.5, 2.0, 0.125, 0.125, 0.125, 0.125]),
    ],
)
@both
def test_by_hand(implementation: Implementation, reduction: LossReduction, weights: list[float]) -> None:
    clipped, row_weight = implementation(*arguments([DOCUMENT], reduction))
    assert clipped.tolist() == [[1, 3], [5, 6], [8, 12]]
    torch.testing.assert_close(row_weight, torch.tensor(weights), rtol=1e-7, atol=0)


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
@both
def test_a_cut_changes_no_weight(implementation: Implementation, reduction: LossReduction) -> None:
    """Promise 1: a document weighs the same in one piece and in many."""
    whole = implementation(*arguments([DOCUMENT], reduction))[1]
    for length in (1, 2, 5, 11):
        starts = range(0, 12, length)
        pieces = [replace(DOCUMENT, start=at, targets=min(length + 1, 12 - at)) for at in starts]
        assert torch.equal(implementation(*arguments(pieces, reduction))[1], whole)


@both
def test_message_and_document_totals_are_their_weights(implementation: Implementation) -> None:
    _, row_weight = implementation(*arguments([DOCUMENT], "message"))
    assert [part.sum().item() for part in row_weight.split([2, 1, 4])] == [1.0, 2.0, 0.5]
    equal = replace(DOCUMENT, spans=tuple((begin, end, 1.0) for begin, end, _ in DOCUMENT.spans), weight=3.0)
    assert implementation(*arguments([equal], "document"))[1].sum().item() == pytest.approx(3.0)


@both
def test_what_weighs_nothing_has_no_rows(implementation: Implementation) -> None:
    silent = replace(DOCUMENT, weight=0.0)
    clipped, row_weight = implementation(*arguments([silent, DOCUMENT], "token"))
    assert (clipped[:3, 0] == clipped[:3, 1]).all()
    assert len(row_weight) == 7


BAD: dict[str, tuple[Piece, str]] = {
    "overlap": (replace(DOCUMENT, spans=((1, 4, 1.0), (3, 5, 1.0))), "span"),
    "descending": (replace(DOCUMENT, spans=((5, 6, 1.0), (1, 2, 1.0))), "span"),
    "reversed": (replace(DOCUMENT, spans=((5, 4, 1.0),)), "span"),
    "before the document": (replace(DOCUMENT, spans=((-1, 4, 1.0),)), "span"),
    "negative weight": (replace(DOCUMENT, spans=((1, 4, -1.0),)), "weight"),
    "infinite weight": (replace(DOCUMENT, spans=((1, 4, float("inf")),)), "weight"),
    "nan weight": (replace(DOCUMENT, spans=((1, 4, float("nan")),)), "weight"),
    "negative piece weight": (replace(DOCUMENT, weight=-1.0), "weight"),
    "nan piece weight": (replace(DOCUMENT, weight=float("nan")), "weight"),
}


@pytest.mark.parametrize("name", BAD)
@both
def test_bad_input_is_refused(implementation: Implementation, name: str) -> None:
    piece, message = BAD[name]
    with pytest.raises(KernelError, match=f"expand_loss_mask: piece 1.*{message}"):
        implementation(*arguments([DOCUMENT, piece], "token"))


@both
def test_bad_offsets_and_another_number_of_rows_are_refused(implementation: Implementation) -> None:
    for offsets in ([0, 3, 2], [1, 2, 3], [0, 1, 2]):
        case = list(arguments([DOCUMENT, replace(DOCUMENT, spans=())], "token"))
        case[2] = torch.tensor(offsets)
        with pytest.raises(KernelError, match="span_offsets"):
            implementation(*case)
    assert len(implementation(*arguments([DOCUMENT], "token", 7))[1]) == 7
    for wrong in (6, 8):
        with pytest.raises(KernelError, match="num_rows"):
            implementation(*arguments([DOCUMENT], "token", wrong))


def test_the_backends_agree_through_the_operation() -> None:
    case = arguments([DOCUMENT, replace(DOCUMENT, start=4, targets=5)], "message")
    found = []
    for kernels in ("reference", "native"):
        backend.choose(kernels)  # type: ignore[arg-type]
        found.append(expand_loss_mask(*case))  # type: ignore[arg-type]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_opcheck() -> None:
    for num_rows in (None, 7):
        results = torch.library.opcheck(
            torch.ops.dsft.expand_loss_mask.default, arguments([DOCUMENT], "document", num_rows)
        )
        assert set(results.values()) == {"SUCCESS"}

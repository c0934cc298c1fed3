from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.errors import KernelError
from dsft.ops import backend, pack
from dsft.ops.pack import pack_sequences
from dsft.ops.reference import PackedRow, pack_sequences_reference

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int | None]
Piece = tuple[int, bool, list[tuple[int, int]]]  # tokens, lookahead, spans


@pytest.fixture(autouse=True)
def _native() -> None:
    backend.choose("native")


def arguments(pieces: list[Piece], row_tokens: int, num_rows: int | None = None) -> Arguments:
    counts = [length + lookahead for length, lookahead, _ in pieces]
    spans = [span for *_, of_piece in pieces for span in of_piece]
    return (
        torch.arange(100, 100 + sum(counts), dtype=torch.int32),
        torch.tensor(np.cumsum([0, *counts]), dtype=torch.int64),
        torch.tensor([lookahead for _, lookahead, _ in pieces], dtype=torch.bool),
        torch.tensor(spans, dtype=torch.int32).reshape(-1, 2),
        torch.tensor(np.cumsum([0, *(len(of_piece) for *_, of_piece in pieces)]), dtype=torch.int64),
        row_tokens,
        7,
        num_rows,
    )


def assert_same(found: PackedRow, expected: PackedRow) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@st.composite
def cases(draw: st.DrawFn) -> Arguments:
    pieces: list[Piece] = []
    for _ in range(draw(st.integers(0, 6))):
        length, lookahead = draw(st.integers(1, 12)), draw(st.booleans())
        targets = length + lookahead
        borders = sorted(draw(st.sets(st.integers(1, targets), max_size=6))) if targets > 1 else []
        pairs = zip(borders[::2], borders[1::2], strict=False)
        pieces.append((length, lookahead, list(pairs)))
    return arguments(pieces, sum(length for length, *_ in pieces) + draw(st.integers(0, 5)))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_native_equals_reference(case: Arguments) -> None:
    assert_same(pack_sequences(*case), pack_sequences_reference(*case))


ODD: dict[str, tuple[list[Piece], int]] = {
    "nothing": ([], 0),
    "padding only": ([], 5),
    "one token": ([(1, False, [])], 1),
    "one token and a lookahead": ([(1, True, [(1, 2)])], 1),
    "full row": ([(3, False, [(1, 3)]), (2, False, [(1, 2)])], 5),
    "spans at the borders": ([(4, True, [(1, 2), (4, 5)]), (4, False, [(3, 4)])], 9),
    "touching spans": ([(6, False, [(1, 3), (3, 6)])], 6),
    "empty spans": ([(6, True, [(1, 1), (2, 4), (4, 4), (4, 4), (5, 7), (7, 7)]), (1, False, [(1, 1)])], 8),
    "many short": ([(1, False, [])] * 50, 64),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str) -> None:
    case = arguments(*ODD[name])
    assert_same(pack_sequences(*case), pack_sequences_reference(*case))


def test_by_hand() -> None:
    case = arguments([(3, True, [(1, 4)]), (2, False, [(1, 2)])], 7)
    ids, positions, borders, rows, targets, owners = pack_sequences(*case)
    assert ids.tolist() == [100, 101, 102, 104, 105, 7, 7]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert borders.tolist() == [0, 3, 5, 7]
    assert rows.tolist() == [0, 1, 2, 3]  # row 2 predicts the lookahead token, row 4 nothing
    assert targets.tolist() == [101, 102, 103, 105]
    assert owners.tolist() == [0, 0, 0, 1]


def test_rows_without_contiguous_memory() -> None:
    case = arguments([(6, False, [(1, 2), (4, 6)])], 8)
    strided = (torch.stack([case[0], case[0]], dim=1)[:, 0], *case[1:])
    assert not strided[0].is_contiguous()
    assert_same(pack_sequences(*strided), pack_sequences_reference(*case))


BAD: dict[str, tuple[list[Piece], int, str]] = {
    "too long": ([(3, False, []), (3, False, [])], 5, "piece 1.*do not fit"),
    "empty piece": ([(3, False, []), (0, False, [])], 5, "piece 1.*no token"),
    "lookahead alone": ([(0, True, [])], 5, "piece 0.*no token"),
    "token 0 predicted": ([(3, False, [(0, 2)])], 5, "piece 0.*span"),
    "beyond the document": ([(3, False, [(1, 4)])], 5, "piece 0.*span"),
    "beyond the lookahead": ([(3, True, [(1, 5)])], 5, "piece 0.*span"),
    "reversed span": ([(3, False, [(2, 1)])], 5, "piece 0.*span"),
    "overlap": ([(3, False, []), (6, False, [(1, 4), (3, 5)])], 9, "piece 1.*span"),
    "descending": ([(6, False, [(3, 5), (1, 2)])], 9, "piece 0.*span"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("implementation", [pack_sequences, pack_sequences_reference])
def test_bad_input_is_refused(name: str, implementation: object) -> None:
    pieces, row_tokens, message = BAD[name]
    with pytest.raises(KernelError, match=message):
        implementation(*arguments(pieces, row_tokens))  # type: ignore[operator]


@pytest.mark.parametrize("implementation", [pack_sequences, pack_sequences_reference])
@pytest.mark.parametrize("position", [1, 4])
@pytest.mark.parametrize("offsets", [[0, 3, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3], [0, 9, 9, 4]])
def test_bad_offsets_are_refused(position: int, offsets: list[int], implementation: object) -> None:
    pieces: list[Piece] = [(2, False, [(1, 2)]), (1, False, []), (1, False, [])]
    if position == 4:
        pieces = [(9, False, [(1, 2), (2, 3), (3, 4), (4, 5)]), (1, False, []), (1, False, [])]
    case = list(arguments(pieces, 20))
    case[position] = torch.tensor(offsets)
    with pytest.raises(KernelError, match="offsets" if position == 1 else "span_offsets"):
        implementation(*case)  # type: ignore[operator]


@pytest.mark.parametrize("implementation", [pack_sequences, pack_sequences_reference])
def test_another_number_of_rows_is_refused(implementation: Callable[..., PackedRow]) -> None:
    pieces, row_tokens = ODD["spans at the borders"]
    assert_same(implementation(*arguments(pieces, row_tokens, 3)), implementation(*arguments(pieces, row_tokens)))
    for wrong in (2, 4):
        with pytest.raises(KernelError, match="num_rows"):
            implementation(*arguments(pieces, row_tokens, wrong))


def test_opcheck() -> None:
    for name in ("spans at the borders", "many short", "padding only"):
        results = torch.library.opcheck(torch.ops.dsft.pack_sequences.default, arguments(*ODD[name]))
        assert set(results.values()) == {"SUCCESS"}


def test_the_backends_are_both_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("pack_sequences_reference", "_pack_sequences_native"):
        function = getattr(pack, name)
        monkeypatch.setattr(pack, name, lambda *a, function=function, name=name: used.append(name) or function(*a))
    for kernels in ("reference", "native"):
        backend.choose(kernels)  # type: ignore[arg-type]
        pack_sequences(*arguments(*ODD["full row"]))
    assert used == ["pack_sequences_reference", "_pack_sequences_native"]


def test_the_first_call_imports_no_compiler() -> None:
    """torch._dynamo costs seconds; a first batch must not pay for it."""
    script = (
        "import sys, tests.ops.test_pack as t; t.pack_sequences(*t.arguments(*t.ODD['full row']));"
        "print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "False"

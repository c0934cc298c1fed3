"""The CUDA kernels of pack_sequences and expand_loss_mask, run by the simulation, against the references."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.errors import KernelError
from dsft.ops.loss_mask import launch_expand
from dsft.ops.pack import launch_pack
from dsft.ops.reference import (
    LOSS_REDUCTIONS,
    PACK_ERRORS,
    LossReduction,
    PackedRow,
    expand_loss_mask_reference,
    pack_sequences_reference,
)
from tests.ops import test_loss_mask as mask_cases
from tests.ops import test_pack as pack_cases
from tests.support.simulation import ORDERS, compiled, load

orders = st.sampled_from(sorted(ORDERS.values()))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(compiled(tmp_path_factory.mktemp("simulated"), "-O1"))


def packed(library: ctypes.CDLL, case: pack_cases.Arguments, num_rows: int) -> tuple[PackedRow, int]:
    found, status = launch_pack(library, *case[:7], num_rows, None)
    return found, int(status)


def assert_packs_as_reference(library: ctypes.CDLL, case: pack_cases.Arguments) -> None:
    expected = pack_sequences_reference(*case)
    found, status = packed(library, case, len(expected[3]))
    assert status == 0
    pack_cases.assert_same(found, expected)


@settings(max_examples=100, deadline=None)
@given(case=pack_cases.cases(), order=orders)
def test_pack_equals_reference(simulated: ctypes.CDLL, case: pack_cases.Arguments, order: int) -> None:
    simulated.dsft_simulation_order(order)
    assert_packs_as_reference(simulated, case)


@pytest.mark.parametrize("name", pack_cases.ODD)
def test_pack_odd_shapes(simulated: ctypes.CDLL, name: str) -> None:
    assert_packs_as_reference(simulated, pack_cases.arguments(*pack_cases.ODD[name]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_pieces", [255, 256, 257, 700])
def test_pack_more_pieces_than_threads(simulated: ctypes.CDLL, num_pieces: int, order: str) -> None:
    simulated.dsft_simulation_order(ORDERS[order])
    pieces: list[pack_cases.Piece] = [(1 + n % 3, n % 2 == 0, [(1, 1 + n % 3)]) for n in range(num_pieces)]
    row_tokens = sum(length for length, *_ in pieces) + 5
    assert_packs_as_reference(simulated, pack_cases.arguments(pieces, row_tokens))


@pytest.mark.parametrize("name", pack_cases.BAD)
def test_pack_bad_input_has_the_status_of_the_error(simulated: ctypes.CDLL, name: str) -> None:
    pieces, row_tokens, _ = pack_cases.BAD[name]
    case = pack_cases.arguments(pieces, row_tokens)
    with pytest.raises(KernelError) as refused:
        pack_sequences_reference(*case)
    num_rows = sum(end - begin for *_, spans in pieces for begin, end in spans)
    piece, code = divmod(packed(simulated, case, max(num_rows, 0))[1], 16)
    assert f"piece {piece}: {PACK_ERRORS[code]}" in str(refused.value)


@pytest.mark.parametrize("place", [1, 4])
@pytest.mark.parametrize("offsets", [[0, 3, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3], [0, 9, 9, 4], [0, -9, 9, 4]])
def test_pack_bad_offsets_are_not_followed(simulated: ctypes.CDLL, place: int, offsets: list[int]) -> None:
    case = list(pack_cases.arguments([(9, False, [(1, 2), (2, 3), (3, 4), (4, 5)]), (1, False, [])] * 2, 20))
    case[place] = torch.tensor([*offsets, case[place][-1] + 1])
    assert packed(simulated, tuple(case), 4)[1] % 16 == {1: 1, 4: 4}[place]  # type: ignore[arg-type]


def test_pack_another_number_of_rows(simulated: ctypes.CDLL) -> None:
    case = pack_cases.arguments(*pack_cases.ODD["spans at the borders"])
    assert packed(simulated, case, 2)[1] % 16 == 7


def expanded(
    library: ctypes.CDLL, pieces: list[mask_cases.Piece], reduction: LossReduction, num_rows: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    clipped, row_weight, status = launch_expand(
        library,
        mask_cases.arguments(pieces, reduction)[:7],  # type: ignore[arg-type]
        reduction,
        num_rows,
        None,
    )
    return clipped, row_weight, int(status)


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(mask_cases.documents(), max_size=5),
    reduction=st.sampled_from(LOSS_REDUCTIONS),
    order=orders,
    known=st.booleans(),
)
def test_expand_equals_reference(
    simulated: ctypes.CDLL, pieces: list[mask_cases.Piece], reduction: LossReduction, order: int, known: bool
) -> None:
    simulated.dsft_simulation_order(order)
    clipped, row_weight = expand_loss_mask_reference(*mask_cases.arguments(pieces, reduction))  # type: ignore[arg-type]
    found = expanded(simulated, pieces, reduction, len(row_weight) if known else None)
    assert found[2] == 0
    assert torch.equal(found[0], clipped)
    assert torch.equal(found[1], row_weight)


@pytest.mark.parametrize("order", ORDERS)
def test_expand_more_pieces_and_rows_than_threads(simulated: ctypes.CDLL, order: str) -> None:
    simulated.dsft_simulation_order(ORDERS[order])
    pieces = [mask_cases.DOCUMENT] * 300
    clipped, row_weight = expand_loss_mask_reference(*mask_cases.arguments(pieces, "document"))  # type: ignore[arg-type]
    found = expanded(simulated, pieces, "document", len(row_weight))
    assert found[2] == 0
    assert torch.equal(found[0], clipped)
    assert torch.equal(found[1], row_weight)


@pytest.mark.parametrize("name", mask_cases.BAD)
def test_expand_bad_input_has_the_status_of_the_error(simulated: ctypes.CDLL, name: str) -> None:
    piece, message = mask_cases.BAD[name]
    status = expanded(simulated, [mask_cases.DOCUMENT, piece], "token", None)[2]
    assert status == 16 + {"span": 5, "weight": 6}[message]


def test_expand_another_number_of_rows(simulated: ctypes.CDLL) -> None:
    assert expanded(simulated, [mask_cases.DOCUMENT], "token", 6)[2] == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "edit"),
    [
        ("block.h", ("scratch[threadIdx.x] = own;\n  __syncthreads();", "scratch[threadIdx.x] = own;")),
        ("block.h", ("first + size < count ? first + size : count}", "first + size}")),
        ("pack_sequences.cu", ("const int64_t position = i - in.cu_seqlens[p];", "const int64_t position = i;")),
        ("pack_sequences.cu", ("if (i < in.num_rows) pack_row", "if (i + 1 < in.num_rows) pack_row")),
        ("expand_loss_mask.cu", ("row < num_rows; row += step", "row < num_rows - 1; row += step")),
    ],
)
def test_the_tests_bite(tmp_path: Path, source: str, edit: tuple[str, str]) -> None:
    """A missing barrier and a wrong index are found in one of the orders."""
    library = load(compiled(tmp_path, "-O1", source=source, edit=edit))
    wrong = 0
    for order in ORDERS:
        try:
            test_pack_more_pieces_than_threads(library, 257, order)
            test_expand_more_pieces_and_rows_than_threads(library, order)
        except AssertionError:
            wrong += 1
    assert wrong

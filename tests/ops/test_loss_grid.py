"""The loss over vocabularies, masks, chunks, addresses and sizes beyond 32 bits, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsft.ops import backend
from dsft.ops.cross_entropy import masked_cross_entropy_rows_
from dsft.ops.linear_cross_entropy import MaskedLoss, masked_linear_cross_entropy
from dsft.ops.reference import IGNORED_TARGET
from tests.support.cross_entropy import OPTIONS, Options, assert_close, case, oracle

HIDDEN = 13
SMALL_VOCABULARIES = [1, 2, 7, 8, 9, 127, 128, 129, 1023, 1025]
LARGE_VOCABULARIES = [32_000, 50_257, 128_256, 151_936, 256_000, 262_144]
PERCENT_MASKED = [0.0, 50.0, 90.0, 99.9, 100.0]


@pytest.fixture(autouse=True)
def _native() -> None:
    backend.choose("native")


def leaves(num_positions: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(num_positions, HIDDEN, generator=generator)
    weight = torch.randn(vocab, HIDDEN, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def supervised(
    num_positions: int, vocab: int, percent_masked: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows, targets, row_weight; at least one row if not all are masked."""
    generator = torch.Generator().manual_seed(num_positions)
    num_rows = 0 if percent_masked == 100 else max(1, round(num_positions * (1 - percent_masked / 100)))
    rows = torch.randperm(num_positions, generator=generator)[:num_rows].sort().values
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    return rows, targets, torch.rand(num_rows, generator=generator) + 0.1


def in_fp64(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, row_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, nll and both gradients by torch in fp64, from all positions' logits."""
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    labels = torch.full(hidden.shape[:1], IGNORED_TARGET)
    labels[rows] = targets
    nll = F.cross_entropy(F.linear(*exact), labels, reduction="none")[rows]
    loss = (nll * row_weight.double()).sum()
    return (loss.detach(), nll.detach(), *torch.autograd.grad(loss, exact))


def assert_equals_fp64(
    found: MaskedLoss, hidden: torch.Tensor, weight: torch.Tensor, expected: tuple[torch.Tensor, ...]
) -> None:
    """Within 1e-5 of fp64; exactly 0 where nothing is supervised."""
    gradients = torch.autograd.grad(found.loss, (hidden, weight))
    for value, exact in zip((found.loss, found.row_nll, *gradients), expected, strict=True):
        assert (value.double() - exact).norm() <= 1e-5 * exact.norm() + (1e-7 if exact.any() else 0.0)


@pytest.mark.parametrize("percent_masked", PERCENT_MASKED)
@pytest.mark.parametrize("vocab", SMALL_VOCABULARIES)
def test_small_vocabularies(vocab: int, percent_masked: float) -> None:
    hidden, weight = leaves(1000, vocab)
    rest = supervised(1000, vocab, percent_masked)
    expected = in_fp64(hidden, weight, *rest)
    assert_equals_fp64(masked_linear_cross_entropy(hidden, weight, None, *rest), hidden, weight, expected)


@pytest.mark.parametrize("vocab", LARGE_VOCABULARIES)
def test_large_vocabularies(vocab: int) -> None:
    hidden, weight = leaves(20, vocab)
    for percent_masked in (0.0, 50.0, 90.0, 100.0):
        rest = supervised(20, vocab, percent_masked)
        expected = in_fp64(hidden, weight, *rest)
        for chunk_rows in (4, 1000):
            budget = 4 * vocab * chunk_rows
            found = masked_linear_cross_entropy(hidden, weight, None, *rest, logits_bytes=budget)
            assert_equals_fp64(found, hidden, weight, expected)


def test_one_row_of_a_large_vocabulary() -> None:
    """The BLAS would add the terms of one row's gradient one after the other, with an error of up to 1e-4."""
    hidden, weight = leaves(1, 262_144)
    rest = supervised(1, 262_144, 0.0)
    found = masked_linear_cross_entropy(hidden, weight, None, *rest)
    assert_equals_fp64(found, hidden, weight, in_fp64(hidden, weight, *rest))


@pytest.mark.parametrize("num_rows", [6, 7, 8, 13, 14, 15])
def test_rows_around_the_border_of_a_chunk(num_rows: int) -> None:
    hidden, weight = leaves(num_rows, 129)
    rest = supervised(num_rows, 129, 0.0)
    found = masked_linear_cross_entropy(hidden, weight, None, *rest, logits_bytes=4 * 129 * 7)
    assert_equals_fp64(found, hidden, weight, in_fp64(hidden, weight, *rest))


@pytest.mark.parametrize("layout", ["transposed", "strided", "misaligned"])
def test_hidden_states_and_weights_anywhere_in_memory(layout: str) -> None:
    plain = leaves(50, 203)
    placed = []
    for leaf in plain:
        if layout == "transposed":
            placed.append(leaf.detach().t().contiguous().t())
        elif layout == "strided":
            placed.append(leaf.detach().repeat_interleave(2, dim=1)[:, ::2])
        else:
            flat = torch.empty(leaf.numel() + 1)[1:]  # 4 bytes beyond an aligned address
            placed.append(flat.view_as(leaf).copy_(leaf.detach()))
    hidden, weight = (leaf.requires_grad_() for leaf in placed)
    rest = supervised(50, 203, 50.0)
    expected = in_fp64(*plain, *rest)
    assert_equals_fp64(masked_linear_cross_entropy(hidden, weight, None, *rest), hidden, weight, expected)


@pytest.mark.parametrize("num_chunks", [1, 2, 16, 128])
def test_bf16_error_is_flat_in_the_number_of_chunks(num_chunks: int) -> None:
    """At most 1.1 times that of torch's own bf16 product with its sums in fp32, whatever the number of chunks."""
    vocab, num_rows = 1031, 512
    hidden, weight = leaves(num_rows, vocab, torch.bfloat16)
    rest = supervised(num_rows, vocab, 0.0)
    _, nll, *expected = in_fp64(hidden, weight, *rest)
    torchs_nll = F.cross_entropy(F.linear(hidden, weight).float(), rest[1], reduction="none")
    torchs = torch.autograd.grad((torchs_nll * rest[2]).sum(), (hidden, weight))
    found = masked_linear_cross_entropy(hidden, weight, None, *rest, logits_bytes=4 * vocab * num_rows // num_chunks)
    ours = torch.autograd.grad(found.loss, (hidden, weight))
    for value, yardstick, exact in zip(
        (found.row_nll, *ours), (torchs_nll.detach(), *torchs), (nll, *expected), strict=True
    ):
        assert (value.double() - exact).norm() <= 1.1 * (yardstick.double() - exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize("with_gradient", [False, True])
def test_more_logits_than_32_bits_count(with_gradient: bool) -> None:
    """2^31 + 2^18 bf16 logits in one call (4.3 GB). Nearly all rows are ignored; those beyond 2^31 are not."""
    vocab, num_rows = 262_144, 2**13 + 1
    logits = torch.empty(num_rows, vocab, dtype=torch.bfloat16)
    small, targets, row_weight = case(3, vocab, torch.bfloat16)
    chosen = torch.tensor([0, num_rows // 2, num_rows - 1])
    logits[chosen] = small
    all_targets = torch.full((num_rows,), IGNORED_TARGET)
    all_targets[chosen] = targets
    all_weights = torch.ones(num_rows)
    all_weights[chosen] = row_weight
    results = masked_cross_entropy_rows_(logits, all_targets, all_weights, with_gradient=with_gradient)
    expected = oracle(small, targets, row_weight, Options())
    found = tuple(result[chosen] for result in results)
    if with_gradient:
        assert_close((found, logits[chosen]), expected, gradient_bound=3e-3)
        for row in (1, num_rows - 2):
            assert not logits[row].any()
    else:
        assert_close((found, expected[1]), expected)  # type: ignore[arg-type]
    assert results[0].count_nonzero() == 3


@pytest.mark.slow
def test_more_logits_over_all_chunks_than_32_bits_count() -> None:
    """65,600 rows of 32,771 logits. The rows are eight different ones, so that eight rows in fp64 say what is right."""
    vocab, repeats = 32_771, 8200
    hidden, weight = leaves(8, vocab)
    rest = supervised(8, vocab, 0.0)
    loss, nll, *_ = in_fp64(hidden, weight, *rest)
    rows = torch.arange(8).repeat(repeats)
    with torch.no_grad():
        many = masked_linear_cross_entropy(hidden, weight, None, rows, rest[1].repeat(repeats), rest[2].repeat(repeats))
    assert len(rows) * vocab > 2**31
    assert many.loss.item() == pytest.approx(repeats * loss.item(), rel=1e-6)
    assert (many.row_nll.view(repeats, 8) - nll).abs().max() < 1e-5 * nll.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_rows_of_logits_at_odd_addresses(offset: int, dtype: torch.dtype) -> None:
    inputs = case(5, 1033, dtype)
    plain = inputs[0].clone()
    expected = masked_cross_entropy_rows_(plain, *inputs[1:], soft_cap=3.0, label_smoothing=0.1)
    wide = torch.full((5, 1050), torch.nan, dtype=dtype)
    place = wide[:, offset : offset + 1033]
    place.copy_(inputs[0])
    results = masked_cross_entropy_rows_(place, *inputs[1:], soft_cap=3.0, label_smoothing=0.1)
    assert torch.equal(place, plain)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert wide[:, :offset].isnan().all()
    assert wide[:, offset + 1033 :].isnan().all()


def test_infinite_logits_of_masked_positions_change_nothing_and_of_rows_are_seen() -> None:
    hidden, weight = leaves(40, 129)
    rest = supervised(40, 129, 50.0)
    clean = masked_linear_cross_entropy(hidden, weight, None, *rest)
    gradients = torch.autograd.grad(clean.loss, (hidden, weight))
    others = torch.ones(40, dtype=torch.bool)
    others[rest[0]] = False
    for value in (torch.inf, -torch.inf, torch.nan, 3e38):
        dirty = hidden.detach().clone()
        dirty[others] = value
        dirty.requires_grad_()
        found = masked_linear_cross_entropy(dirty, weight, None, *rest)
        assert torch.equal(found.loss, clean.loss)
        again = torch.autograd.grad(found.loss, (dirty, weight))
        assert all(torch.equal(*pair) for pair in zip(again, gradients, strict=True))
    seen = hidden.detach().clone()
    seen[rest[0][3]] = torch.inf
    assert masked_linear_cross_entropy(seen, weight, None, *rest).row_nll.isnan().tolist() == [
        number == 3 for number in range(20)
    ]


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]])
def test_every_row_alone_gives_its_part_of_them_together(options: Options) -> None:
    """Rows do not mix: bitwise the same, whichever rows stand beside them."""
    inputs = case(20, 2053)
    together = inputs[0].clone()
    keywords = {"scale": options.scale, "soft_cap": options.soft_cap, "z_loss": options.z_loss}
    results = masked_cross_entropy_rows_(together, *inputs[1:], **keywords)  # type: ignore[arg-type]
    for row in range(20):
        part = slice(row, row + 1)
        alone = inputs[0][part].clone()
        ones = masked_cross_entropy_rows_(alone, inputs[1][part], inputs[2][part], **keywords)  # type: ignore[arg-type]
        assert torch.equal(alone, together[part])
        assert all(torch.equal(one, all_rows[part]) for one, all_rows in zip(ones, results, strict=True))


BLOCK = 1024
"""Logits of one step of the CPU's loop."""


@pytest.mark.parametrize("target", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK])
def test_targets_at_the_borders_of_blocks(target: int) -> None:
    inputs = case(2, 3 * BLOCK + 1)
    inputs[1][:] = target
    gradient = inputs[0].clone()
    results = masked_cross_entropy_rows_(gradient, *inputs[1:])
    assert_close((results, gradient), oracle(*inputs, Options()))


@pytest.mark.parametrize("first", [BLOCK + 3, 2 * BLOCK])
def test_equal_logits_in_other_blocks(first: int) -> None:
    """Only the first of the largest is correct, also if others come in the same block or in another one."""
    logits = torch.zeros(3, 3 * BLOCK)
    places = torch.tensor([first, first + 500, 3 * BLOCK - 1])
    logits[:, places] = 5.0
    results = masked_cross_entropy_rows_(logits, places, torch.ones(3))
    assert results[4].tolist() == [True, False, False]

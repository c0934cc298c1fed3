"""Every operation against something else that says the same, on the device at hand: ``dsft ops check``.

The oracles are torch in fp64 and, for index arithmetic, the Python references. The test suite does more of the same;
this runs where no tests are installed, on the very machine that will train.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from dsft.ops.cross_entropy import masked_cross_entropy_rows_
from dsft.ops.linear_cross_entropy import masked_linear_cross_entropy
from dsft.ops.loss_mask import Inputs, expand_loss_mask
from dsft.ops.pack import pack_sequences
from dsft.ops.reference import (
    IGNORED_TARGET,
    LOSS_REDUCTIONS,
    LossReduction,
    expand_loss_mask_reference,
    pack_sequences_reference,
)

VOCABULARIES = (1, 7, 129, 2049, 32_003)
_ROW_BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 4e-3), torch.float64: (1e-12, 1e-12)}
"""Of the loss, relative to the log-normaliser, and of the gradient, relative to its norm (bf16 rounds it to 2^-9)."""
_PLAIN: dict[str, Any] = {"scale": 1.0, "soft_cap": None, "label_smoothing": 0.0, "z_loss": 0.0}
_ALL: dict[str, Any] = {"scale": 0.5, "soft_cap": 5.0, "label_smoothing": 0.2, "z_loss": 1e-2}


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: ``error`` must be at most ``bound`` (not a number fails)."""

    operation: str
    case: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound


def kernel_checks(device: torch.device) -> Iterator[Check]:
    """The checks of dsft's own kernels, without a matrix product: few enough for a sanitizer."""
    yield from _packing(device)
    for dtype in _ROW_BOUNDS:
        for vocab in VOCABULARIES:
            yield from _rows(device, dtype, vocab)


def run_checks(device: torch.device) -> Iterator[Check]:
    """All checks, one after the other."""
    yield from kernel_checks(device)
    for dtype in (torch.float32, torch.bfloat16):
        for masked in (0.0, 0.5, 0.9, 1.0):
            for num_chunks in (1, 5):
                yield from _linear(device, dtype, masked, num_chunks)
    yield _repeated(device)


def _packing(device: torch.device) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    for num_pieces in (0, 1, 3, 700):
        lengths = torch.randint(1, 40, (num_pieces,), generator=generator)
        has_lookahead = torch.rand(num_pieces, generator=generator) < 0.5
        counts = lengths + has_lookahead
        offsets = F.pad(counts.cumsum(0), (1, 0))
        edges = torch.rand(num_pieces, 4, generator=generator).sort(1).values * (counts[:, None] + 3)
        spans = (
            edges.floor().to(torch.int32).reshape(-1, 2)
        )  # of the document, which began three tokens before the piece
        span_offsets = torch.arange(num_pieces + 1) * 2
        weights = torch.rand(len(spans), generator=generator)
        start = torch.full((num_pieces,), 3)
        factors = torch.rand(num_pieces, generator=generator, dtype=torch.float64)
        mask = (spans, weights, span_offsets, start, counts, counts + 3, factors)
        tokens = torch.randint(0, 1000, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
        for reduction in LOSS_REDUCTIONS:
            yield from _packed(device, tokens, offsets, has_lookahead, mask, reduction)


def _packed(
    device: torch.device,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    has_lookahead: torch.Tensor,
    mask: Inputs,
    reduction: LossReduction,
) -> Iterator[Check]:
    case = f"{has_lookahead.numel()} pieces, {reduction}"
    expected = expand_loss_mask_reference(*mask, reduction, None)
    found = expand_loss_mask(*_moved(mask, device), reduction, len(expected[1]))
    yield Check("expand_loss_mask", case, _difference(found, expected), 0.0)
    columns = (tokens, offsets, has_lookahead, expected[0], mask[2])
    row_tokens = tokens.numel() + 5
    rows = pack_sequences_reference(*columns, row_tokens, 7, None)
    packed = pack_sequences(*_moved(columns, device), row_tokens, 7, len(rows[3]))
    yield Check("pack_sequences", case, _difference(packed, rows), 0.0)


_Columns = TypeVar("_Columns", bound=tuple[torch.Tensor, ...])


def _moved(columns: _Columns, device: torch.device) -> _Columns:
    return tuple(column.to(device) for column in columns)  # type: ignore[return-value]


def _difference(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    return 0.0 if all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True)) else math.inf


def _rows(device: torch.device, dtype: torch.dtype, vocab: int) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, vocab, (5,), generator=generator)
    targets[0], targets[1] = logits[0].argmax(), IGNORED_TARGET
    row_weight = torch.rand(5, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for name, options in (("plain", _PLAIN), ("all options", _ALL)):
        loss, gradient, scale = _exact_rows(logits, targets, row_weight, **options)
        place = logits.to(device, copy=True)
        found = masked_cross_entropy_rows_(place, targets.to(device), row_weight.to(device), **options)
        errors = (float(((found[0].cpu().double() - loss) / scale).abs().max()), _relative(place, gradient))
        for what, error, bound in zip(("loss", "gradient"), errors, _ROW_BOUNDS[dtype], strict=True):
            yield Check("masked_cross_entropy_rows_", f"{_name(dtype)}, {vocab}, {name}: {what}", error, bound)


def _exact_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradient in fp64 by autograd, and what the loss's error is relative to."""
    raw = logits.to(torch.float64, copy=True).requires_grad_()
    z = raw * scale
    z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
    log_normaliser = torch.logsumexp(z, 1)
    loss = F.cross_entropy(z, targets, reduction="none")
    uniform = log_normaliser - z.mean(1)
    kept = targets != IGNORED_TARGET
    loss = (1 - label_smoothing) * loss + kept * (label_smoothing * uniform + z_loss * log_normaliser**2)
    (gradient,) = torch.autograd.grad((loss * row_weight.double()).sum(), raw)
    return loss.detach(), gradient, log_normaliser.detach().abs().clamp(min=1.0)


def _linear(device: torch.device, dtype: torch.dtype, masked: float, num_chunks: int) -> Iterator[Check]:
    hidden, weight, rows, targets, row_weight = linear_case(200, 64, 1003, masked, dtype, device)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    oracle = torch.autograd.grad(_plain_loss(exact[0], exact[1], rows, targets, row_weight.double()), exact)
    torchs = torch.autograd.grad(_plain_loss(hidden, weight, rows, targets, row_weight), (hidden, weight))
    budget = 4 * 1003 * max(1, math.ceil(len(rows) / num_chunks))
    found = masked_linear_cross_entropy(hidden, weight, None, rows, targets, row_weight, logits_bytes=budget)
    ours = torch.autograd.grad(found.loss, (hidden, weight))
    for name, gradient, plain, other in zip(("dX", "dW"), ours, torchs, oracle, strict=True):
        case = f"{_name(dtype)}, {masked:.0%} masked, {num_chunks} chunks: {name}"
        # In half precision the bound is torch's own error, a tenth more.
        bound = 1e-5 if dtype == torch.float32 else 1.1 * _relative(plain, other) + 1e-6
        yield Check("masked_linear_cross_entropy", case, _relative(gradient, other), bound)


def _plain_loss(
    hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, row_weight: torch.Tensor
) -> torch.Tensor:
    logits = F.linear(hidden, weight)[rows]
    upcast = logits if logits.dtype == torch.float64 else logits.float()
    return (F.cross_entropy(upcast, targets, reduction="none") * row_weight).sum()


def linear_case(
    num_tokens: int, hidden_size: int, vocab: int, masked: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states and weight (leaves), rows, targets and equal row weights that sum to 1."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab, hidden_size, generator=generator) * hidden_size**-0.5
    chosen = torch.rand(num_tokens, generator=generator) >= masked
    rows = torch.nonzero(chosen)[:, 0]
    targets = torch.randint(0, vocab, rows.shape, generator=generator)
    row_weight = torch.full(rows.shape, 1.0 / max(1, len(rows)))
    leaves = (leaf.to(device=device, dtype=dtype).requires_grad_() for leaf in (hidden, weight))
    first, second = leaves
    return first, second, rows.to(device), targets.to(device), row_weight.to(device)


def _repeated(device: torch.device) -> Check:
    """The same bits over ten runs."""
    case = linear_case(300, 64, 1003, 0.3, torch.bfloat16, device)
    found = []
    for _ in range(10):
        result = masked_linear_cross_entropy(case[0], case[1], None, *case[2:], logits_bytes=4 * 1003 * 64)
        found.append([result.loss, *torch.autograd.grad(result.loss, case[:2])])
    equal = all(torch.equal(one, other) for run in found[1:] for one, other in zip(run, found[0], strict=True))
    return Check("masked_linear_cross_entropy", "ten runs are bitwise equal", 0.0 if equal else math.inf, 0.0)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    one, other = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]

"""Rows of logits with explicit formulas in fp64, for the tests of every implementation of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsft.ops.reference import IGNORED_TARGET, CrossEntropyRows


@dataclass(frozen=True)
class Options:
    scale: float = 1.0
    soft_cap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


OPTIONS = {
    "plain": Options(),
    "scale": Options(scale=0.25),
    "cap": Options(soft_cap=3.0),
    "smoothing": Options(label_smoothing=0.1),
    "z-loss": Options(z_loss=1e-2),
    "all": Options(0.5, 5.0, 0.2, 1e-2),
}


def oracle(
    logits: torch.Tensor, targets: torch.Tensor, row_weight: torch.Tensor, options: Options
) -> tuple[CrossEntropyRows, torch.Tensor]:
    """Results and gradient in fp64 by torch's autograd."""
    raw = logits.double().requires_grad_()
    z = raw * options.scale
    if options.soft_cap is not None:
        z = options.soft_cap * torch.tanh(z / options.soft_cap)
    log_p = torch.log_softmax(z, 1)
    kept = targets != IGNORED_TARGET
    column = targets.where(kept, 0)[:, None]
    nll = -log_p.gather(1, column)[:, 0]
    log_normaliser = torch.logsumexp(z, 1)
    loss = nll + options.z_loss * log_normaliser**2
    if options.label_smoothing > 0:
        loss = loss - options.label_smoothing * (nll + log_p.mean(1))
    entropy = torch.special.entr(log_p.exp()).sum(1)
    correct = z.argmax(1) == targets
    gradient = torch.zeros_like(raw)
    used = kept & (row_weight != 0)
    if used.any():
        (gradient,) = torch.autograd.grad((loss[used] * row_weight[used].double()).sum(), raw)
    results = tuple(torch.where(kept, value.detach(), 0) for value in (loss, nll, log_normaliser, entropy))
    return (*results, correct & kept), gradient  # type: ignore[return-value]


def case(num_rows: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 4.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(num_rows, vocab, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    if num_rows:
        targets[0] = logits[0].argmax()
    row_weight = torch.rand(num_rows, generator=generator) + 0.1
    return [logits, targets, row_weight.to(torch.float64 if dtype == torch.float64 else torch.float32)]


def keywords(options: Options) -> dict[str, float | None]:
    return {name: getattr(options, name) for name in ("scale", "soft_cap", "label_smoothing", "z_loss")}


def assert_close(
    found: tuple[CrossEntropyRows, torch.Tensor],
    expected: tuple[CrossEntropyRows, torch.Tensor],
    bound: float = 1e-5,
    gradient_bound: float = 1e-5,
) -> None:
    for left, right in zip(found[0][:4], expected[0][:4], strict=True):
        scale = torch.maximum(right.abs(), expected[0][2].abs()).clamp(min=1.0)
        assert ((left.double() - right).abs() <= bound * scale).all(), (left, right)
    assert torch.equal(found[0][4], expected[0][4])
    rows = (found[1].double() - expected[1]).norm(dim=1)
    assert (rows <= gradient_bound * expected[1].norm(dim=1) + 1e-7).all(), rows

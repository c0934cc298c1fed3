"""The loss beside every other one that is installed: time, peak memory, useful TFLOP/s and error: ``dsft ops bench``.

All sides compute the mean loss over the same supervised tokens, forward and backward, in one process, in turns.
Useful work is 6 n H V floating-point operations for n supervised tokens; what a side spends on masked ones is
not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dsft.ops import peers
from dsft.ops.peers import IGNORED, Loss

REPETITIONS = 5
ERROR_TOKENS, ERROR_VOCAB = 1024, 32_768
"""Errors are measured once a side and distribution, on CUDA at this size."""


@dataclass(frozen=True, slots=True)
class Size:
    """One cell of the table. ``logits``: flat (of a new model) or trained (most targets are likely)."""

    tokens: int
    hidden: int
    vocab: int
    masked: float
    logits: str


@dataclass(frozen=True, slots=True)
class Figure:
    """What one side did at one size; ``problem`` where it could not.

    Attributes:
        milliseconds: median of ``REPETITIONS`` forwards and backwards.
        peak_bytes: most memory allocated beside inputs, CUDA only.
        useful_tflops: 6 n H V / time.
    """

    side: str
    size: Size
    milliseconds: float | None = None
    peak_bytes: int | None = None
    useful_tflops: float | None = None
    problem: str | None = None


def sizes(device_type: str) -> list[Size]:
    """The table: on CUDA a model of hidden size 4,096; on the CPU what takes seconds."""
    if device_type == "cpu":
        return [
            Size(512, 256, vocab, masked, logits)
            for vocab in (8_192, 32_000)
            for masked in (0.0, 0.5, 0.9)
            for logits in ("trained", "flat")
        ]
    # Odd vocabulary first, then the whole grid, from its cheapest cells on: the budget may not reach the last ones.
    return [
        Size(8192, 4096, 50_257, 0.0, "flat"),
        *(
            Size(tokens, 4096, vocab, masked, logits)
            for tokens in (8192, 16_384, 65_536)
            for vocab in (131_072, 32_768, 262_144)
            for masked in (0.0, 0.9, 0.5)
            for logits in ("trained", "flat")
        ),
    ]


def inputs(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight (leaves) and targets."""
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(size.vocab, size.hidden, generator=generator, device=device, dtype=dtype) * size.hidden**-0.5
    hidden = torch.randn(size.tokens, size.hidden, generator=generator, device=device, dtype=dtype)
    targets = torch.randint(0, size.vocab, (size.tokens,), generator=generator, device=device)
    if size.logits == "trained":  # a target's logit is some 12 above the others' mean
        hidden = 0.5 * hidden + 12.0 * weight[targets]
    targets[torch.rand(size.tokens, generator=generator, device=device) < size.masked] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def measure(device: torch.device, budget_seconds: float) -> Iterator[Figure]:
    """The table's figures, until the budget is spent; what was not measured says so."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    began = time.perf_counter()
    for size in sizes(device.type):
        if time.perf_counter() - began > budget_seconds:
            yield Figure("all", size, problem="not measured: the time is spent")
        else:
            yield from _figures(size, *inputs(size, device, dtype))


def _figures(size: Size, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[Figure]:
    """One cell: every side once for its memory, then all in turns for their time."""
    useful = 6.0 * int((targets != IGNORED).sum()) * size.hidden * size.vocab / 1e12
    found: dict[str, Figure] = {}
    peaks: dict[str, int | None] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, loss in _usable(hidden.device.type).items():
        call = partial(_gradients, loss, hidden, weight, targets)
        try:
            peaks[name] = _peak_bytes(call, hidden.is_cuda)
            calls[name] = call
        except torch.OutOfMemoryError:
            found[name] = Figure(name, size, problem="out of memory")
        except Exception as error:  # noqa: BLE001  (a peer's failure is its figure; dsft's own is no less visible)
            found[name] = Figure(name, size, problem=f"{type(error).__name__}: {str(error)[:200]}")
        if hidden.is_cuda:
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPETITIONS):
        for name, timed in calls.items():
            times[name].append(_seconds(timed, hidden.is_cuda))
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        found[name] = Figure(name, size, 1e3 * middle, peaks[name], useful / middle)
    return [found[name] for name in _usable(hidden.device.type)]


def _usable(device_type: str) -> dict[str, Loss]:
    return {side.name: side.loss for side in peers.sides(device_type) if side.loss is not None}


def _gradients(
    loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))


def _peak_bytes(call: Callable[[], object], on_cuda: bool) -> int | None:
    """Most memory allocated during the second call (the first compiles, and fills caches); None on the CPU."""
    call()
    if not on_cuda:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def _seconds(call: Callable[[], object], on_cuda: bool) -> float:
    if not on_cuda:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def errors(device: torch.device) -> list[dict[str, Any]]:
    """Relative error (Frobenius norm) of each side's gradients of hidden states and weight, half of the tokens masked.

    Against torch eager in fp32 on CUDA, in fp64 on the CPU.
    """
    dtype, exact = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32, torch.float64)
    found = []
    for logits in ("flat", "trained"):
        tokens, vocab = (ERROR_TOKENS, ERROR_VOCAB) if device.type == "cuda" else (256, 4096)
        hidden, weight, targets = inputs(Size(tokens, 512, vocab, 0.5, logits), device, dtype)
        leaves = (hidden, weight)
        wide = [leaf.detach().to(exact).requires_grad_() for leaf in leaves]
        oracle = torch.autograd.grad(peers.torch_eager(wide[0], wide[1], targets), wide)
        for name, loss in _usable(hidden.device.type).items():
            record: dict[str, Any] = {"side": name, "logits": logits}
            try:
                gradients = _gradients(loss, hidden, weight, targets)
                for what, gradient, other in zip(("dX", "dW"), gradients, oracle, strict=True):
                    record[what] = float((gradient.to(exact) - other).norm() / other.norm())
            except Exception as error:  # noqa: BLE001  (as in _figure)
                record["problem"] = f"{type(error).__name__}: {str(error)[:200]}"
            found.append(record)
    return found


def to_json(figure: Figure) -> dict[str, Any]:
    """The figure as one flat object."""
    record = asdict(figure)
    return {**record.pop("size"), **record}

"""``torch.ops.dsft.masked_linear_cross_entropy``: output projection, loss and gradients of the supervised rows only.

Masked positions never reach the vocabulary projection, and the logits of all rows never exist at once: chunk by chunk,
a matrix product gives logits, ``masked_cross_entropy_rows_`` turns them into their gradient in place, and two products
add it to the gradients of the hidden states and of the weight. So nothing of rows times vocabulary outlives a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dsft.ops.cross_entropy import result_dtype

LOGITS_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Logits that exist at once, counted as fp32, by type of device. Fixed, never taken from free memory, so that a run's
arithmetic is reproducible. On CUDA so many that summing the weight's gradient in fp32 (read and written once a chunk)
is small beside a chunk's products: 4,096 rows at a vocabulary of 128 k."""

_ALIGNED_COLUMNS = 8
"""Rows of logits begin at a multiple of 16 bytes also in bf16, where cuBLAS is fast."""


_SUMMED_COLUMNS = 4_096
"""Terms of a gradient of hidden states that the CPU's matrix product sums at once. Of few rows it may add all one after
the other: over a vocabulary of 128,256 one row of MKL was off by 5e-5 on one processor, and by 2e-6 in such blocks."""


class MaskedLoss(NamedTuple):
    """What ``masked_linear_cross_entropy`` returns; only ``loss`` has a gradient.

    Attributes:
        loss: scalar ``sum(row_weight * row_loss)``, where row_loss is nll with label smoothing and z-loss.
        row_nll: [n], minus the target's log-probability.
        row_log_normaliser: [n], log-sum-exp of the logits.
        row_entropy: [n], of the predicted distribution, in nats.
        row_correct: bool[n], the target is the first of the largest logits.
    """

    loss: torch.Tensor
    row_nll: torch.Tensor
    row_log_normaliser: torch.Tensor
    row_entropy: torch.Tensor
    row_correct: torch.Tensor


torch.library.define(
    "dsft::masked_linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor row_weight, float scale, float? soft_cap, "
    "float label_smoothing, float z_loss, SymInt chunk_rows, bool[3] wants_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("dsft::masked_linear_cross_entropy", "CompositeExplicitAutograd")
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
    wants_gradient: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    num_rows, dtype = hidden.shape[0], result_dtype(weight)
    hidden_gradient = torch.empty_like(hidden) if wants_gradient[0] else hidden.new_empty(0)
    # One chunk is one product in the weight's own type; sums over chunks are kept in fp32.
    one_chunk = 0 < num_rows <= chunk_rows
    weight_gradient = weight.new_empty(0)
    if wants_gradient[1]:
        weight_gradient = torch.empty_like(weight) if one_chunk else torch.zeros_like(weight, dtype=dtype)
    bias_gradient = weight.new_zeros(weight.shape[0] if wants_gradient[2] else 0, dtype=dtype)
    loss_sum = weight.new_zeros((), dtype=torch.float64)
    nll, log_normaliser, entropy = (weight.new_empty(num_rows, dtype=dtype) for _ in range(3))
    correct = weight.new_empty(num_rows, dtype=torch.bool)
    for start in range(0, num_rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits = _logits(hidden[chunk], weight, bias)
        loss, nll[chunk], log_normaliser[chunk], entropy[chunk], correct[chunk] = (
            torch.ops.dsft.masked_cross_entropy_rows_(
                logits, targets[chunk], row_weight[chunk], scale, soft_cap, label_smoothing, z_loss, any(wants_gradient)
            )
        )
        loss_sum += torch.where(row_weight[chunk] == 0, 0.0, loss.double() * row_weight[chunk].double()).sum()
        if wants_gradient[2]:
            bias_gradient += logits.sum(0, dtype=dtype)
        if wants_gradient[0]:
            _product_over_vocabulary(logits, weight, out=hidden_gradient[chunk])
        if wants_gradient[1] and one_chunk:
            torch.mm(logits.t(), hidden, out=weight_gradient)
        elif wants_gradient[1]:
            _add_product_(weight_gradient, logits.t(), hidden[chunk])
    results = (loss_sum.to(dtype), nll, log_normaliser, entropy, correct)
    return (*results, hidden_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``hidden @ weight.T + bias``; rows of an odd vocabulary are padded in memory, not in shape."""
    vocab = weight.shape[0]
    if vocab % _ALIGNED_COLUMNS == 0:
        return F.linear(hidden, weight, bias)
    logits = hidden.new_empty(hidden.shape[0], vocab + -vocab % _ALIGNED_COLUMNS)[:, :vocab]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


def _product_over_vocabulary(logits: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """``out = logits @ weight``, in fp32 on the CPU block by block of the vocabulary.

    Not of halves, whose partial sums would be rounded; and on CUDA nothing was measured yet.
    """
    if logits.is_cuda or logits.dtype.itemsize < 4:
        torch.mm(logits, weight, out=out)
        return
    torch.mm(logits[:, :_SUMMED_COLUMNS], weight[:_SUMMED_COLUMNS], out=out)
    for start in range(_SUMMED_COLUMNS, weight.shape[0], _SUMMED_COLUMNS):
        block = slice(start, start + _SUMMED_COLUMNS)
        out += torch.mm(logits[:, block], weight[block])  # addmm_ would go on adding to out, term by term


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``; a product of half-precision chunks is accumulated without rounding it first."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # the CPU's matrix product has no wider output type
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _forward_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
    wants_gradient: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    num_rows, dtype = hidden.shape[0], result_dtype(weight)
    return (
        weight.new_empty((), dtype=dtype),
        *(weight.new_empty(num_rows, dtype=dtype) for _ in range(3)),
        weight.new_empty(num_rows, dtype=torch.bool),
        torch.empty_like(hidden) if wants_gradient[0] else hidden.new_empty(0),
        torch.empty_like(weight) if wants_gradient[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if wants_gradient[2] else 0),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.wants_gradient = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else backward would fill zeros for each of them, also of the weight's size
    ctx.save_for_backward(*output[5:])


def _backward(ctx: Any, loss_gradient: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if loss_gradient is None:
        return (None,) * 11
    # Scaled on the device, always: asking whether the factor is 1 would make the host wait. A training step scales the
    # row weights instead, so that here the factor is 1 and half-precision gradients are rounded once.
    scaled = (
        _scaled(saved, loss_gradient) if wanted else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.wants_gradient, strict=True)
    )
    return (*scaled, *[None] * 8)


def _scaled(saved: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``saved * factor``: in place if this is its last use, so that no second gradient of the weight's size is made."""
    is_traced = type(saved) is not torch.Tensor  # by torch.compile, which does so itself
    if is_traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return saved * factor
    return saved.mul_(factor)


torch.library.register_fake("dsft::masked_linear_cross_entropy", _forward_fake)
torch.library.register_autograd("dsft::masked_linear_cross_entropy", _backward, setup_context=_save_gradients)


def masked_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_bytes: int | None = None,
) -> MaskedLoss:
    """Cross-entropy of some rows of ``hidden @ weight.T + bias``, without computing any other row.

    Gradients of hidden, weight and bias are computed in the forward pass, each only if it is wanted. With one chunk the
    weight's gradient is one product, rounded once; with several it is summed in fp32. Without rows the loss is 0 and
    the gradients are zeros, so every rank of a sharded model takes the same path.

    Args:
        hidden: [..., H]; converted to the weight's dtype.
        weight: float32, bfloat16 or float64 [V, H]; bias: [V] or None.
        rows: int64[n], positions in the flattened leading dimensions of hidden; targets: int64[n], columns or
            IGNORED_TARGET; row_weight: float32[n].
        scale, soft_cap, label_smoothing, z_loss: as in ``masked_cross_entropy_rows_``.
        logits_bytes: size of a chunk's logits, counted as fp32; None: LOGITS_BYTES of the device.

    Raises:
        KernelError: shapes or dtypes that do not fit; on the CPU, a target that is no column.
    """
    supervised = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows).to(weight.dtype)
    leaves = (supervised, weight, bias)
    wants_gradient = [leaf is not None and torch.is_grad_enabled() and leaf.requires_grad for leaf in leaves]
    budget_bytes = LOGITS_BYTES[weight.device.type] if logits_bytes is None else logits_bytes
    results = torch.ops.dsft.masked_linear_cross_entropy(
        supervised,
        weight,
        bias,
        targets,
        row_weight.to(result_dtype(weight)),
        scale,
        soft_cap,
        label_smoothing,
        z_loss,
        max(1, budget_bytes // (4 * weight.shape[0])),
        wants_gradient,
    )
    return MaskedLoss(*results[:5])

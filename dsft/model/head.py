"""The output head: logits of the supervised rows only, their loss, and its gradients, in chunks of fixed size.

Masked positions never reach the vocabulary projection, and the logits of a whole micro-batch never exist at once. The
loss and its gradients are computed together in the forward pass, so nothing of vocabulary size outlives a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LOGITS_BYTES = 256 * 2**20
"""fp32 logits that exist at once. Fixed, never taken from free memory, so that a run's arithmetic is reproducible."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its raw logits: ``cap * tanh(scale * logits / cap)``, without the tanh when cap is None."""

    scale: float = 1.0
    soft_cap: float | None = None


def cross_entropy_rows_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weight: torch.Tensor,
    transform: LogitTransform,
    with_gradient: bool,
) -> torch.Tensor:
    """Negative log-likelihood of each row, and its gradient written over the logits.

    Args:
        logits: fp32[c, V], raw (before ``transform``). Overwritten: with the gradient of ``sum(row_weight * nll)`` with
            respect to the raw logits when ``with_gradient``, else with nothing meaningful.
        targets: int64[c]; row_weight: fp32[c].

    Returns:
        fp32[c], unweighted.
    """
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    slope = None
    if transform.soft_cap is not None:
        logits.div_(transform.soft_cap).tanh_()
        slope = 1.0 - logits * logits if with_gradient else None
        logits.mul_(transform.soft_cap)
    column = targets.unsqueeze(1)
    log_normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
    nll = (log_normaliser - logits.gather(1, column)).squeeze(1)
    if with_gradient:
        logits.sub_(log_normaliser).exp_()
        logits.scatter_add_(1, column, torch.full_like(column, -1.0, dtype=logits.dtype))
        logits.mul_(row_weight.unsqueeze(1) * transform.scale)
        if slope is not None:
            logits.mul_(slope)
    return nll


class _LinearCrossEntropy(torch.autograd.Function):
    """sum(row_weight * nll) of ``hidden @ weight.T + bias``; its gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        row_weight: torch.Tensor,
        transform: LogitTransform,
        with_gradient: bool,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = hidden.shape[0]
        wants_hidden, wants_weight, wants_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        # One chunk is one product in the weight's own type; sums over chunks are kept in fp32.
        gradient_dtype = weight.dtype if num_rows <= chunk_rows else torch.float32
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=gradient_dtype) if wants_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        row_nll = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits = F.linear(hidden[chunk], weight, bias).float()
            row_nll[chunk] = cross_entropy_rows_(logits, targets[chunk], row_weight[chunk], transform, with_gradient)
            if bias_gradient is not None:
                bias_gradient += logits.sum(0)
            gradient = logits.to(weight.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[chunk])
            if weight_gradient is not None:
                _add_product_(weight_gradient, gradient.t(), hidden[chunk])
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(row_nll)
        loss_sum = (row_nll.double() * row_weight.double()).sum().float()
        return loss_sum, row_nll

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Scaled on the device, always: asking whether the factor is 1 would make the host wait.
        scaled = [None if saved is None else (saved * gradients[0]).to(ctx.dtype) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``; a product of half-precision chunks is accumulated without rounding it first."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:  # the CPU's matrix product has no wider output type
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class MaskedLMHead(nn.Module):
    """Owns the output embedding in place of the model's own head: same parameters, same names.

    Called as a module once per micro-batch by every rank, whatever its number of supervised rows, so that ZeRO-3
    gathers the weight equally often everywhere.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transform: LogitTransform) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.transform = transform
        self.logits_bytes = LOGITS_BYTES

    def forward(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        row_weight: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Raw logits (``hidden`` alone: generation), or the loss of the supervised rows.

        Args:
            hidden: [..., H].
            rows: int64[n], positions in the flattened leading dimensions; targets: int64[n]; row_weight: fp32[n].

        Returns:
            Logits [..., V] as the model's own head gives them (the model applies its scale and cap itself); or
            ``(loss_sum, row_nll)``: fp32 scalar ``sum(row_weight * nll)``, and fp32[n] without gradient.
        """
        if rows is None or targets is None or row_weight is None:
            return F.linear(hidden, self.weight, self.bias)
        supervised = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows).to(self.weight.dtype)
        chunk_rows = max(1, self.logits_bytes // (4 * self.weight.shape[0]))
        loss_sum, row_nll = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            supervised,
            self.weight,
            self.bias,
            targets,
            row_weight,
            self.transform,
            torch.is_grad_enabled(),
            chunk_rows,
        )
        return loss_sum, row_nll


def logit_transform(config: Any) -> LogitTransform:
    """The scale and soft cap that a model's config asks for (Granite, Cohere, Gemma); the start-up probe checks it."""
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
    if getattr(config, "logit_scale", None) is not None:
        scale *= float(config.logit_scale)
    soft_cap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale, None if soft_cap is None else float(soft_cap))


def install_head(hf: Any) -> MaskedLMHead:
    """Replace the output head of a Hugging Face causal model by a ``MaskedLMHead`` over the same parameters."""
    old = hf.get_output_embeddings()
    head = MaskedLMHead(old.weight, getattr(old, "bias", None), logit_transform(hf.config.get_text_config()))
    head.train(old.training)
    hf.set_output_embeddings(head)
    return head

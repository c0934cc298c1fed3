"""The output head: owns the output embedding and computes the loss of the supervised rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsft.ops.linear_cross_entropy import masked_linear_cross_entropy


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its raw logits: ``cap * tanh(scale * logits / cap)``, without the tanh when cap is None."""

    scale: float = 1.0
    soft_cap: float | None = None


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
        self.logits_bytes: int | None = None
        self.asked: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        row_weight: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raw logits (``hidden`` alone: generation), or the loss of the supervised rows.

        Args:
            hidden: [..., H].
            rows: int64[n], positions in the flattened leading dimensions; targets: int64[n]; row_weight: fp32[n].

        Returns:
            Logits [..., V] as the model's own head gives them (the model applies its scale and cap itself); or
            ``(loss_sum, row_nll, row_correct)``: fp32 scalar ``sum(row_weight * nll)``, fp32[n] without gradient, and
            bool[n], whether the target has the first of the largest logits.

        What is ``asked`` (rows, targets, row_weight) stands in for arguments that a model's own code does not pass on.
        """
        if self.asked is not None:
            rows, targets, row_weight = self.asked
        if rows is None or targets is None or row_weight is None:
            return F.linear(hidden, self.weight, self.bias)
        result = masked_linear_cross_entropy(
            hidden,
            self.weight,
            self.bias,
            rows,
            targets,
            row_weight,
            scale=self.transform.scale,
            soft_cap=self.transform.soft_cap,
            logits_bytes=self.logits_bytes,
        )
        return result.loss, result.row_nll, result.row_correct


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

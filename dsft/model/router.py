"""The router loss of mixture-of-experts models, over document tokens only."""

from __future__ import annotations

import sys
from typing import Any

import torch

from dsft.errors import ModelError


def wants_router_loss(hf: Any) -> bool:
    """Whether the model's config asks for a router loss.

    Raises:
        ModelError: it does, but the model's router loss is not the load-balancing loss computed here.
    """
    if not getattr(hf.config, "output_router_logits", False):
        return False
    known = (
        hasattr(sys.modules[type(hf).__module__], "load_balancing_loss_func")
        and all(hasattr(hf, name) for name in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef"))
        and hf.num_experts > hf.num_experts_per_tok
    )
    if not known:
        raise ModelError(
            f"{hf.config.model_type}: its router loss cannot be kept to document tokens, so it is refused. Set "
            "output_router_logits to false in the model's config to train without it."
        )
    return True


def router_loss(hf: Any, router_logits: tuple[torch.Tensor, ...], num_tokens: int) -> torch.Tensor:
    """Load-balancing loss (Switch Transformer, arXiv 2101.03961, equations 4-6) times coefficient and tokens.

    It is a statistic of one micro-batch. Multiplied by the micro-batch's document tokens, the sum over micro-batches
    divided by all document tokens is the token-weighted mean. Padding, the row's tail, is left out; a filler gives 0.

    Args:
        router_logits: per layer [L, experts].
        num_tokens: document tokens, the first of the row.

    Returns:
        fp32 scalar.
    """
    if num_tokens == 0:
        return router_logits[0].new_zeros((), dtype=torch.float32)
    documents = tuple(layer.reshape(-1, layer.shape[-1])[:num_tokens] for layer in router_logits)
    balance = sys.modules[type(hf).__module__].load_balancing_loss_func  # the model's own definition
    loss: torch.Tensor = balance(documents, hf.num_experts, hf.num_experts_per_tok)
    return loss.float() * (float(hf.router_aux_loss_coef) * num_tokens)

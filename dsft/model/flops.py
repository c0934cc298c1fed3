"""Arithmetic a model costs, counted on a copy of it without storage: for balancing packs and for MFU."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from dsft.model.auto import auto_class

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Floating-point operations of one training step (forward and backward: three times the forward).

    A step over documents of lengths n_i with r supervised rows costs
    ``flops_per_token * sum(n_i) + flops_per_token_pair * sum(n_i ** 2) + flops_per_row * r``. The second forward
    of activation checkpointing is not counted, and a sliding window counts as full attention.

    Attributes:
        flops_per_token: matrices of the decoder; of the experts only those that a token visits.
        flops_per_token_pair: attention; where it is causal half of the pairs (already halved).
        flops_per_row: the vocabulary projection, which only supervised rows reach.
    """

    flops_per_token: float
    flops_per_token_pair: float
    flops_per_row: float


def model_cost(hf_config: Any, is_masked: bool = False) -> ModelCost:
    """Cost of the model that ``hf_config`` describes, from the shapes of its own parameters.

    Args:
        is_masked: it is an encoder with a masked-language-modelling head.
    """
    with torch.device("meta"):
        return cost_of(auto_class(is_masked).from_config(copy.deepcopy(hf_config)), is_masked)


def cost_of(hf: Any, is_masked: bool = False) -> ModelCost:
    """Cost of a Hugging Face model, which may be without storage."""
    head = hf.get_output_embeddings().weight
    embeddings = {id(head), id(hf.get_input_embeddings().weight)}
    text = hf.config.get_text_config()
    active_experts = _first(text, _EXPERTS_PER_TOKEN, 1) / _first(text, _NUM_EXPERTS, 1)
    matrices = 0.0
    for name, parameter in hf.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in embeddings and not _is_lookup(hf, name):
            matrices += parameter.numel() * (active_experts if ".experts." in name else 1.0)
    heads = int(text.num_attention_heads)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    # Forward: 2 products of 2 * heads * head_size operations a pair, over half of the pairs where attention is causal;
    # times 3 with backward.
    pairs = 3 * 2 * 2 * heads * head_size / (1 if is_masked else 2) * text.num_hidden_layers
    return ModelCost(6.0 * matrices, float(pairs), 6.0 * head.numel())


def _is_lookup(hf: Any, name: str) -> bool:
    """Position embeddings and the like are looked up, not multiplied."""
    return isinstance(hf.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding)


def _first(config: Any, keys: tuple[str, ...], default: int) -> int:
    for key in keys:
        value = getattr(config, key, None)
        if value:
            return int(value)
    return default

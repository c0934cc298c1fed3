"""Tiny random models of many architectures, and packed rows for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # the usual 0.02 makes attention nearly uniform, and errors in it invisible
}
_WINDOW = {"sliding_window": 5}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "llama-tied": {**_BASE, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**_BASE, **_WINDOW},
    "qwen2": _BASE,
    "qwen3": {**_BASE, "head_dim": 8},
    "gemma2": {
        **_BASE,
        **_WINDOW,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**_BASE, **_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": _BASE,
    "phi": _BASE,  # head with a bias
    "gpt_neox": _BASE,
    "gpt2": _GPT2,
    "olmo2": _BASE,
    "granite": {
        **_BASE,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
    },
    "cohere": {**_BASE, "logit_scale": 0.25},
    "opt": {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0},
    "mixtral": {**_BASE, "num_local_experts": 4},
    "qwen3_moe": {**_BASE, **_EXPERTS, "head_dim": 8},
    "gpt_oss": {**_BASE, "head_dim": 8, "num_local_experts": 4},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba2": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 8,
    },
    "qwen3_next": {
        **_BASE,
        **_EXPERTS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {**_BASE, "layer_types": ["conv", "full_attention"]},
}


def tiny_config(name: str, **changes: Any) -> Any:
    """Config of the tiny model ``name``."""
    keys = {**CONFIGS[name], **changes}
    return AutoConfig.for_model(keys.pop("model_type", name), **keys)


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, attention: str = "eager", **changes: Any) -> Any:
    """A plain transformers model with fixed random weights, in eval mode; every parameter is random, norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        hf = AutoModelForCausalLM.from_config(tiny_config(name, **changes), attn_implementation=attention).eval()
        with torch.no_grad():
            for parameter in hf.parameters():
                if parameter.dim() == 1:  # biases that are all 0 and norms that are all 1 would hide mistakes
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return hf.to(dtype)


@dataclass(frozen=True)
class Row:
    """One packed row of random documents, with a random part supervised at random weights."""

    lengths: tuple[int, ...]
    ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    row_weight: torch.Tensor

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of PackedCausalLM.forward."""
        return {
            "input_ids": self.ids[None],
            "position_ids": torch.cat([torch.arange(length) for length in self.lengths])[None],
            "cu_seqlens": torch.tensor([0, *self.lengths]).cumsum(0).int(),
            "max_seqlen": max(self.lengths),
            "rows": self.rows,
            "targets": self.targets,
            "row_weight": self.row_weight,
        }

    def loss_of_plain(self, hf: Any) -> torch.Tensor:
        """The same loss from a plain transformers model, one document at a time."""
        total = torch.zeros(())
        start = 0
        for length in self.lengths:
            document = self.ids[start : start + length]
            logits = hf(input_ids=document[None], use_cache=False).logits[0].float()
            inside = (self.rows >= start) & (self.rows < start + length)
            nll = torch.nn.functional.cross_entropy(
                logits[self.rows[inside] - start], self.targets[inside], reduction="none"
            )
            total = total + (nll * self.row_weight[inside]).sum()
            start += length
        return total


def random_row(lengths: tuple[int, ...] = (7, 1, 16, 9), *, supervised: float = 0.6, seed: int = 0) -> Row:
    """A row whose rows are supervised with probability ``supervised`` (0.0: none)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
    ends = torch.tensor(lengths).cumsum(0) - 1
    possible = torch.ones(len(ids), dtype=torch.bool)
    possible[ends] = False
    chosen = possible & (torch.rand(len(ids), generator=generator) < supervised)
    rows = chosen.nonzero().squeeze(1)
    weight = torch.rand(len(rows), generator=generator) + 0.5
    return Row(lengths, ids, rows, ids[rows + 1] if len(rows) else rows, weight)


def copy_of(hf: Any) -> Any:
    """An independent copy: wrapping a model changes it in place."""
    return copy.deepcopy(hf)

"""Counted arithmetic against torch's own counter of executed operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsft.model.flops import model_cost
from tests.support.models import tiny_model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2", "gpt_neox", "phi3"])
def test_equals_what_torch_counts(name: str) -> None:
    hf = tiny_model(name)
    cost = model_cost(hf.config)

    def counted(length: int) -> int:
        with FlopCounterMode(display=False) as counter:
            logits = hf(input_ids=torch.arange(length)[None], use_cache=False).logits
            logits.sum().backward()
        return counter.get_total_flops()

    def predicted(length: int) -> float:
        # eager attention computes all pairs, not the causal half
        return (cost.flops_per_token + cost.flops_per_row) * length + 2 * cost.flops_per_token_pair * length**2

    for length in (8, 64):
        assert counted(length) == pytest.approx(predicted(length), rel=0.02)  # rotary tables and the like


def test_only_visited_experts_count() -> None:
    every = model_cost(tiny_model("mixtral", num_experts_per_tok=4).config)
    half = model_cost(tiny_model("mixtral", num_experts_per_tok=2).config)
    experts = 2 * 4 * (2 * 48 * 32 + 48 * 32)
    assert every.flops_per_token - half.flops_per_token == 6.0 * experts / 2


def test_the_models_config_is_left_alone() -> None:
    hf = tiny_model("llama", dtype=torch.bfloat16)
    before = hf.config.to_dict()
    model_cost(hf.config)
    assert hf.config.to_dict() == before

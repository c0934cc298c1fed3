"""The start-up proof accepts models that keep dsft's promises and refuses the others by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsft.errors import ModelError
from dsft.model.head import LogitTransform
from dsft.model.packed import PackedCausalLM
from dsft.model.probe import prove
from tests.support.models import tiny_model

ACCEPTED = [
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi",
    "gpt_neox",
    "gpt2",
    "olmo2",
    "granite",
    "cohere",
    "opt",
    "mixtral",
    "qwen3_moe",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACCEPTED)
def test_models_that_isolate_pass(name: str, dtype: torch.dtype) -> None:
    model = PackedCausalLM(tiny_model(name, dtype=dtype)).train()
    prove(model, "cpu")
    assert model.training
    assert model.hf.config._attn_implementation == "dsft_varlen"


@pytest.mark.parametrize("name", ["gpt_oss", "bloom", "falcon", "mamba2", "qwen3_next", "lfm2"])
def test_models_that_cannot_isolate_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=r"(?i)refused") as caught:
        prove(PackedCausalLM(tiny_model(name)), "cpu")
    assert name.replace("_", "") in str(caught.value).lower().replace("_", "")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_is_found(name: str, dtype: torch.dtype) -> None:
    model = PackedCausalLM(tiny_model(name, dtype=dtype))
    plain = model.documents

    def merged(cu_seqlens: torch.Tensor, max_seqlen: int) -> Any:
        total = int(cu_seqlens[-1])
        return plain(torch.tensor([0, total], dtype=torch.int32), total)

    model.documents = merged  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=f"{name}: changing one token of a document changed its neighbour"):
        prove(model, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_a_scale_or_cap_that_the_head_ignores_is_found(name: str, dtype: torch.dtype) -> None:
    model = PackedCausalLM(tiny_model(name, dtype=dtype))
    model.head().transform = LogitTransform()
    with pytest.raises(ModelError, match="scales or caps its logits"):
        prove(model, "cpu")


def test_a_soft_cap_too_high_to_matter_at_the_start_is_found_too() -> None:
    model = PackedCausalLM(tiny_model("gemma2", final_logit_softcapping=30.0, initializer_range=0.02))
    model.head().transform = LogitTransform()
    with pytest.raises(ModelError, match="scales or caps its logits"):
        prove(model, "cpu")


def test_positions_numbered_along_the_row_are_found() -> None:
    model = PackedCausalLM(tiny_model("gpt2"))
    decoder = model.hf.base_model
    forward = decoder.forward

    def ignores_positions(**kwargs: Any) -> Any:
        return forward(**{**kwargs, "position_ids": torch.arange(kwargs["input_ids"].shape[1])[None]})

    decoder.forward = ignores_positions
    with pytest.raises(ModelError, match="ignores position_ids"):
        prove(model, "cpu")


def test_a_window_that_attention_is_not_told_about_is_found() -> None:
    model = PackedCausalLM(tiny_model("mistral"))
    for layer in model.hf.model.layers:
        layer.self_attn.config.sliding_window = 7
        layer.self_attn.sliding_window = None
    model.hf.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="sliding windows"):
        prove(model, "cpu")

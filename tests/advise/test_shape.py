"""Parameter counts against published ones, and counted activations against what autograd keeps in a real forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dsft.advise.shape import ModelShape, model_shape
from dsft.config.models import ModelSection
from dsft.model.load import read_hf_config
from tests.advise.families import FAMILIES
from tests.support.models import tiny_config, tiny_model


@pytest.mark.parametrize("name", list(FAMILIES))
def test_published_parameter_counts_are_exact(name: str) -> None:
    published, config = FAMILIES[name]
    section = ModelSection(config=config, tokenizer="unused")
    shape = model_shape(read_hf_config(section, 0), torch.bfloat16)
    assert shape.num_parameters == published
    assert shape.num_trained == published


def test_frozen_parameters_are_not_trained() -> None:
    config = tiny_config("llama")
    whole, part = model_shape(config, torch.float32), model_shape(config, torch.float32, ("*.mlp.*",))
    assert whole.num_parameters == part.num_parameters
    assert whole.num_trained - part.num_trained == 2 * 3 * 32 * 48


def kept_by_a_real_forward(hf: Any, length: int) -> int:
    """Bytes of the distinct storages that autograd keeps below the head, of torch's own fused CPU attention."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in hf.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hf.train()
    hf.set_attn_implementation("sdpa")
    ids = torch.arange(length)[None] % 90
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert output.shape[1] == length
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "phi3", "olmo2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps(name: str, checkpointing: bool) -> None:
    length, wide = 256, {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": 512}
    if name in ("gpt_neox", "phi3", "olmo2"):
        wide.pop("head_dim")
    shape: ModelShape = model_shape(tiny_config(name, **wide), torch.float32)
    hf = tiny_model(name, **wide)
    if checkpointing:
        hf.activation_checkpointing_enable({"use_reentrant": False})
    counted = shape.checkpointed_bytes_per_token if checkpointing else shape.activation_bytes_per_token
    # Exact for three of them; where one projection makes query, key and value, torch's CPU kernel copies its output.
    bound = 0.09 if name in ("gpt_neox", "phi3") and not checkpointing else 1e-6
    assert counted * length == pytest.approx(kept_by_a_real_forward(hf, length), rel=bound)


def test_a_seventy_billion_model_has_a_shape_without_storage() -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    shape = model_shape(config, torch.bfloat16)
    assert shape.num_parameters == 70_553_706_496  # Llama 3.1 70B
    # bf16: a layer's input; and inside at least its two norms, q, k, v and output, gate, up and their product.
    assert shape.checkpointed_bytes_per_token == pytest.approx(80 * 8192 * 2, rel=0.1)
    assert shape.layer_bytes_per_token > 3 * 28672 * 2 + 4 * 8192 * 2

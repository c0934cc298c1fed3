"""The router loss against transformers' own, over document tokens only."""

from __future__ import annotations

import pytest
import torch

from dsft.errors import ModelError
from dsft.model.packed import PackedCausalLM
from tests.support.models import copy_of, random_row, tiny_model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_equals_transformers_without_padding_and_fillers(name: str, checkpointing: bool) -> None:
    plain = tiny_model(name, output_router_logits=True, router_aux_loss_coef=0.3)
    model = PackedCausalLM(copy_of(plain)).train()
    if checkpointing:
        model.hf.activation_checkpointing_enable({"use_reentrant": False})
    row = random_row((14, 6), supervised=0.0)  # the second document stands for the padding tail
    output = model(**row.inputs(), num_tokens=14)
    expected = plain(input_ids=row.ids[None, :14], use_cache=False).aux_loss
    assert output.loss.item() == 0.0
    assert output.aux_loss.item() == pytest.approx(0.3 * 14 * expected.item(), rel=1e-6)
    output.aux_loss.backward()
    (0.3 * 14 * expected).backward()
    ours = dict(model.hf.named_parameters())
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            error = (ours[key].grad - parameter.grad).abs().max() / parameter.grad.abs().max()
            assert error < 1e-5, key
    assert model(**row.inputs(), num_tokens=0).aux_loss.item() == 0.0


def test_without_it_in_the_config_there_is_none() -> None:
    model = PackedCausalLM(tiny_model("mixtral"))
    assert model(**random_row().inputs()).aux_loss.item() == 0.0


def test_an_unknown_router_loss_is_refused() -> None:
    hf = tiny_model("llama")
    hf.config.output_router_logits = True
    with pytest.raises(ModelError, match="output_router_logits to false"):
        PackedCausalLM(hf)


def test_separate_experts_become_a_leaf_module() -> None:
    from dsft.model.load import _mark_leaf_modules

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    outer = torch.nn.Sequential(Block())
    _mark_leaf_modules(outer)
    assert outer[0]._z3_leaf
    assert not hasattr(outer, "_z3_leaf")

"""Positions end somewhere: packs beyond that end are refused, because documents in them would change each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsft.errors import ModelError
from dsft.model.packed import PackedCausalLM
from dsft.model.positions import check_positions
from tests.support.models import VOCAB, tiny_model

REACH = 16
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": REACH, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def limited(kind: str) -> Any:
    if kind == "longrope":
        return tiny_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=REACH)
    if kind == "dynamic":
        return tiny_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=REACH)
    return tiny_model("gpt2", n_positions=REACH)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "table"])
def test_packs_beyond_the_reach_are_refused(kind: str) -> None:
    hf = limited(kind)
    check_positions(hf, REACH)
    with pytest.raises(ModelError, match=f"{REACH} or less"):
        check_positions(hf, REACH + 1)


def test_other_models_have_no_end() -> None:
    for name in ("llama", "gemma3_text", "gpt_neox", "qwen3_moe"):
        check_positions(tiny_model(name), 10**6)


def nll(model: PackedCausalLM, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=ids[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
            max_seqlen=max(lengths),
            rows=torch.arange(5),
            targets=ids[1:6],
            row_weight=torch.ones(5),
        ).row_nll


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_reason_a_long_neighbour_changes_a_document(kind: str) -> None:
    model = PackedCausalLM(limited(kind)).eval()
    ids = torch.randint(3, VOCAB, (6 + REACH + 4,), generator=torch.Generator().manual_seed(0))
    alone = nll(model, ids[:6], [6])
    assert torch.equal(alone, nll(model, ids[: 6 + REACH], [6, REACH]))
    assert not torch.allclose(alone, nll(model, ids, [6, REACH + 4]), rtol=1e-4)

"""ZeRO-3 on two real gloo ranks against the same model whole: creation, proof, generation, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsft.dist import Groups
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from dsft.model.generate import generate
from dsft.model.initialise import gathered
from dsft.model.packed import PackedCausalLM
from dsft.model.parameters import freeze, full_shape, num_parameters, parameter_groups
from dsft.model.probe import prove
from tests.support.models import CONFIGS, random_row
from tests.support.ranks import run_ranks
from tests.support.zero3 import ZERO3, load

PROMPTS = [[5, 6, 7, 8], [9]]
STEPS = 2


def assert_same(whole: PackedCausalLM, sliced: PackedCausalLM, num_ranks: int, *, resized: bool = False) -> None:
    assert num_parameters(whole) == num_parameters(sliced)
    for (name, one), (other_name, other) in zip(whole.named_parameters(), sliced.named_parameters(), strict=True):
        assert name == other_name
        assert full_shape(other) == tuple(one.shape)
        if not resized:  # resized embeddings are cut by the engine, later
            assert other.ds_tensor.numel() <= -(-one.numel() // num_ranks), name
            assert other.numel() == 0, name
        with gathered([other], modify=False):
            assert torch.equal(one, other), name


def created(groups: Groups, folder: str) -> None:
    """Random weights and weights of a folder, whole and in slices."""
    for name in ("gpt2", "llama", "mixtral"):
        config = {"model_type": name, **CONFIGS[name]}
        whole = load(False, config=config)
        assert_same(whole, load(True, config=config), groups.size)
        path = f"{folder}/{name}"
        if groups.rank == 0:
            whole.hf.save_pretrained(path)
        groups.barrier()
        assert_same(load(False, path=path), load(True, path=path), groups.size)
        assert_same(
            load(False, path=path, added_tokens=3), load(True, path=path, added_tokens=3), groups.size, resized=True
        )


VARIANTS = [
    # model, activation checkpointing, frozen
    ("llama", True, ()),
    ("llama-tied", False, ()),
    ("phi", False, ()),  # head with a bias
    ("mixtral", False, ()),
    ("llama", False, ("lm_head.*",)),
]


def trained(groups: Groups, shares: tuple[float, ...]) -> None:
    """Every variant, one after the other."""
    for name, checkpointing, frozen in VARIANTS:
        train_variant(groups, shares, name, checkpointing, frozen)


def train_variant(
    groups: Groups, shares: tuple[float, ...], name: str, checkpointing: bool, frozen: tuple[str, ...]
) -> None:
    """Two steps with uneven rows (none on one rank): every gradient equals that of the whole model."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=False), "cpu")
    config = {"model_type": name, **CONFIGS[name]}
    whole, sliced = (
        load(partitioned, config=config, activation_checkpointing=checkpointing) for partitioned in (False, True)
    )
    freeze(sliced, frozen)
    freeze(whole, frozen)
    optimizer = torch.optim.SGD(parameter_groups(sliced, 0.0), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=sliced, optimizer=optimizer, config=ZERO3)
    prove(engine.module, "cpu")
    for step in range(STEPS):
        answers = generate(
            engine.module, PROMPTS[groups.rank :], max_new_tokens=4 + groups.rank, eos_ids=[], pad_id=0, synced=True
        )
        expected = generate(
            whole, PROMPTS[groups.rank :], max_new_tokens=4 + groups.rank, eos_ids=[], pad_id=0, synced=False
        )
        assert answers == expected
        rows = [random_row((8, 12), supervised=share, seed=10 * step + rank) for rank, share in enumerate(shares)]
        loss = engine(**rows[groups.rank].inputs()).loss
        engine.backward(loss * groups.size, scale_wrt_gas=False)  # ZeRO takes the mean over ranks
        whole.zero_grad()
        for row in rows:
            whole(**row.inputs()).loss.backward()
        for (key, one), other in zip(whole.named_parameters(), engine.module.parameters(), strict=True):
            if not one.requires_grad:
                continue
            gradient = safe_get_full_grad(other)
            assert (gradient - one.grad).norm() <= 1e-5 * one.grad.norm() + 1e-6, f"{name}, step {step}: {key}"
        engine.step()
        with torch.no_grad():
            for one, other in zip(whole.parameters(), engine.module.parameters(), strict=True):
                with gathered([other], modify=False):
                    one.copy_(other)


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_partitioned_creation_gives_the_values_of_the_whole_model(tmp_path: Path) -> None:
    run_ranks(created, 2, str(tmp_path), timeout_seconds=540)


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_gradients_generation_and_proof_equal_the_whole_model() -> None:
    run_ranks(trained, 2, (0.8, 0.0), timeout_seconds=540)

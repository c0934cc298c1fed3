"""AdamW of offloaded state: an update is a function of its step and state, so that a resume changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsft.config.models import TrainSection
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from dsft.train.optimizer import build_optimizer

NUM_STEPS, STOP = 40, 7


def offloaded(parameter: torch.Tensor) -> torch.optim.Optimizer:
    section = TrainSection.model_validate({"steps": NUM_STEPS, "global_batch_packs": 1, "lr": 1e-2})
    groups: list[dict[str, Any]] = [{"params": [parameter], "weight_decay": 0.1}]
    return build_optimizer(groups, section, offloaded=True, device_type="cpu")


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1001, generator=generator) for _ in range(NUM_STEPS)]


def steps(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, part: list[torch.Tensor]) -> None:
    for gradient in part:
        parameter.grad = gradient.clone()
        optimizer.step()


@pytest.fixture(autouse=True)
def _built() -> None:
    prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=True), "cpu")


def test_updates_after_a_resume_are_those_of_an_uninterrupted_run_bit_by_bit() -> None:
    whole = torch.zeros(1001)
    steps(offloaded(whole), whole, gradients())

    first = torch.zeros(1001)
    before = offloaded(first)
    steps(before, first, gradients()[:STOP])
    second = first.clone()
    after = offloaded(second)
    after.load_state_dict(before.state_dict())
    steps(after, second, gradients()[STOP:])
    assert torch.equal(second, whole)


def test_updates_are_those_of_torch() -> None:
    ours, theirs = torch.zeros(1001), torch.zeros(1001)
    steps(offloaded(ours), ours, gradients())
    torch_adam = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    assert tuple(offloaded(ours).param_groups[0][key] for key in ("betas", "eps")) == ((0.9, 0.95), 1e-8)
    steps(torch_adam, theirs, gradients())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

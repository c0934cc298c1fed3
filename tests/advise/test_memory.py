"""The parts of memory against DeepSpeed's own estimators, and what offload, stage and ranks do to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from transformers import AutoConfig

from dsft.advise.memory import Memory, memory_of, settings_of
from dsft.advise.shape import ModelShape, model_shape

ZERO3 = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 1000}
STATES = ("weights", "optimizer: fp32", "optimizer: moments", "gradients: own slice")


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return model_shape(config, torch.bfloat16)


def memory(shape: ModelShape, zero: dict[str, Any], *, ranks: int = 8, **other: Any) -> Memory:
    deepspeed = {
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    defaults = {"checkpointing": False, "micro_batch_tokens": 1024, "supervised_share": 1.0}
    placed = {"dtype": "bf16", "num_ranks": ranks, "ranks_per_host": min(ranks, 8), "on_cpu": False}
    return memory_of(shape, settings_of(deepspeed, **{**defaults, **placed, **other}))


def part(found: Memory, name: str) -> int:
    return sum(one.num_bytes for one in found.parts if one.name.startswith(name))


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_states_of_zero_3_are_deepspeeds_eighteen_bytes(shape: ModelShape, ranks: int) -> None:
    _, on_device, _ = estimate_zero3_model_states_mem_needs(
        shape.num_parameters, 0, min(ranks, 8), max(1, ranks // 8), cpu_offload=False, cpu_offload_params=False,
        zero_init=True,
    )  # fmt: skip
    found = memory(shape, ZERO3, ranks=ranks)
    assert sum(part(found, name) for name in STATES) == pytest.approx(on_device, rel=1e-4)


def test_stages_one_and_two_are_those_of_the_table_of_ds_configs(shape: ModelShape) -> None:
    num = shape.num_parameters
    for stage, per_parameter in ((1, 6 + 12 / 8), (2, 2 + 16 / 8)):
        found = memory(shape, {"stage": stage, "reduce_bucket_size": 1000})
        states = sum(part(found, name) for name in ("weights", "optimizer", "gradients"))
        assert states == pytest.approx(per_parameter * num, rel=1e-4)


def test_offload_moves_states_to_the_host_of_all_its_ranks(shape: ModelShape) -> None:
    plain = memory(shape, ZERO3)
    optimizer = memory(shape, {**ZERO3, "offload_optimizer": {"device": "cpu"}})
    both = memory(shape, {**ZERO3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})
    assert plain.peak("host") == 0
    assert optimizer.peak("host") == pytest.approx(20 * shape.num_parameters, rel=1e-4)  # 8 ranks of one host: all
    assert both.peak("host") == pytest.approx(22 * shape.num_parameters, rel=1e-4)
    assert plain.peak("device") > optimizer.peak("device") > both.peak("device")
    disk = memory(shape, {**ZERO3, "offload_optimizer": {"device": "nvme"}})
    assert disk.peak("nvme") >= 16 * shape.num_parameters
    many = memory(shape, {**ZERO3, "offload_optimizer": {"device": "nvme", "buffer_count": 12}})
    assert part(many, "offload: buffers") == 3 * part(disk, "offload: buffers") > 0


def test_checkpointing_and_the_masked_head(shape: ModelShape) -> None:
    plain, checkpointed = memory(shape, ZERO3), memory(shape, ZERO3, checkpointing=True)
    assert part(checkpointed, "activations") < 0.6 * part(plain, "activations")
    assert part(memory(shape, ZERO3, micro_batch_tokens=2048), "activations") == pytest.approx(
        2 * part(plain, "activations"), rel=1e-6
    )
    masked = memory(shape, ZERO3, supervised_share=0.1)
    assert part(masked, "logits") < part(plain, "logits")
    # However many rows there are, their logits never exist at once: 256 MiB of fp32, so half of that in bf16.
    many = memory(shape, ZERO3, micro_batch_tokens=1_000_000)
    hidden = 2 * 1_000_000 * shape.hidden_size * 2
    assert next(one.num_bytes for one in many.parts if one.name == "logits") - hidden <= 128 * 2**20


def test_backward_and_step_do_not_add_up(shape: ModelShape) -> None:
    found = memory(shape, ZERO3)
    when = {name: sum(p.num_bytes for p in found.parts if p.when == name) for name in ("always", "backward", "step")}
    assert found.peak("device") == when["always"] + max(when["backward"], when["step"])
    assert min(when.values()) > 0


def test_on_the_cpu_zero_3_gathers_weights_into_the_blocks_that_it_freed(shape: ModelShape) -> None:
    """Measured by ``benchmarks/estimate.py`` at 300 million parameters: the heap does not grow after the partition."""
    zero = {**ZERO3, "stage3_max_reuse_distance": 10**9, "offload_optimizer": {"device": "cpu"}}
    one = {"ranks": 1, "dtype": "fp32", "on_cpu": True, "micro_batch_tokens": 128}
    found = memory(shape, zero, **one)
    freed = part(found, "process: freed blocks")
    assert 0 < freed < part(found, "communication: weights in use")
    assert found.peak("host") == sum(one.num_bytes for one in found.parts) - freed
    other = memory(shape, {**zero, "stage": 2}, **one)
    assert other.peak("host") == sum(one.num_bytes for one in other.parts if one.when != "step")
    assert part(other, "process: freed blocks") == freed

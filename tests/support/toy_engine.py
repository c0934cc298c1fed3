"""A small model in a DeepSpeed engine, with all that makes checkpoints hard, and its whole state by other means."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import numpy as np
import torch

from dsft.dist import Groups
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops

SETTINGS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1, "offload": False},
    "stage 1 bf16": {"stage": 1, "offload": False, "bf16": True},
    "stage 2 bf16": {"stage": 2, "offload": False, "bf16": True},
    "stage 2 offload": {"stage": 2, "offload": True},
    "stage 3": {"stage": 3, "offload": False},
    "stage 3 offload": {"stage": 3, "offload": True},
    "stage 3 offload bf16": {"stage": 3, "offload": True, "bf16": True},
}
BATCH_ROWS = 12
"""Rows of the global batch, which 1, 2, 3 and 4 ranks can share equally."""


class Toy(torch.nn.Module):
    """Odd sizes, so that ZeRO pads; small vectors, which ZeRO-3 keeps gathered; tied weights; frozen ones; buffers."""

    def __init__(self, hidden: int = 13, inner: int = 29, *, freeze: bool = True) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(37, hidden)
        self.first = torch.nn.Linear(hidden, inner)
        self.norm = torch.nn.LayerNorm(inner)
        self.second = torch.nn.Linear(inner, hidden, bias=False)
        self.frozen = torch.nn.Linear(hidden, hidden)
        self.frozen.requires_grad_(not freeze)
        self.head = torch.nn.Linear(hidden, 37, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([0.5]).float())  # zero.Init makes new tensors in the run's type
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss of ids[rows, tokens]."""
        hidden = self.norm(torch.tanh(self.first(self.embedding(ids[:, :-1]))))
        logits = self.head(self.frozen(self.second(hidden)) * self.scale.to(hidden.dtype)).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_engine(settings: dict[str, Any], seed: int, hidden: int = 13, inner: int = 29) -> Any:
    """An engine around :class:`Toy` with two parameter groups. Collective.

    Args:
        settings: one of SETTINGS, perhaps with a ``device_type`` other than cpu; for stage 3 also ``zero`` and ``aio``
            (put over those sections of DeepSpeed's configuration), and ``freeze``: false, nothing is frozen.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    device_type, nvme = settings.get("device_type", "cpu"), "aio" in settings
    prepare_deepspeed_ops(needed_ops(device_type, cpu_adam=settings["offload"], nvme=nvme), device_type)
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": settings["stage"]},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if settings.get("bf16"):
        config["bf16"] = {"enabled": True}
    if settings["offload"]:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if settings["stage"] == 3:
            config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": False}
    if settings["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 40  # the norm and biases stay gathered
        config["zero_optimization"]["sub_group_size"] = settings.get("sub_group_size", 300)  # several a group
        config["zero_optimization"] |= settings.get("zero", {})
        if nvme:
            config["aio"] = settings["aio"]
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Toy(hidden, inner, freeze=settings.get("freeze", True))
    else:
        model = Toy(hidden, inner)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if _dimensions(p) > 1], "weight_decay": 0.1, "lr": 1e-2, "name": "matrices"},
        {"params": [p for p in trained if _dimensions(p) == 1], "weight_decay": 0.0, "lr": 5e-3, "name": "vectors"},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
    if settings["offload"]:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _dimensions(parameter: Any) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def train(engine: Any, first_step: int, num_steps: int, groups: Groups) -> list[float]:
    """Losses of the global batch, which is the same at every number of ranks that divides it. Collective."""
    losses = []
    for step in range(first_step, first_step + num_steps):
        batch = torch.randint(0, 37, (BATCH_ROWS, 9), generator=torch.Generator().manual_seed(step))
        loss = engine(batch[groups.rank :: groups.size].to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(float(groups.sum(np.array([float(loss.detach())]))[0]) / groups.size)
    return losses


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    """Weights, masters, moments and buffers, whole, gathered by DeepSpeed's own functions. Collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() != 3:  # DeepSpeed links its views of the states late, and only once
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {name: buffer.detach().clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        is_cut = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if is_cut else contextlib.nullcontext():
            found[name] = parameter.detach().clone()
        if parameter.requires_grad:
            found[f"{name}/master"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    for number, group in enumerate(engine.optimizer.param_groups):
        found[f"group {number}"] = torch.tensor([group["lr"], group["weight_decay"], *group["betas"]])
    steps = [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]
    found["steps"] = torch.tensor(sorted(set(steps)))
    return found


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not bit-equal."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )

"""AdamW over decay and no-decay groups, in the form that fits where ZeRO keeps the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch

from dsft.config.models import TrainSection


def build_optimizer(
    groups: list[dict[str, Any]], section: TrainSection, *, offloaded: bool, device_type: str
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, decoupled decay) with the run's hyper-parameters.

    Args:
        groups: parameter groups with their own ``weight_decay``.
        offloaded: the optimizer's state lives in host memory (``offload_optimizer``); then DeepSpeed's vectorised CPU
            Adam does the update, which its ZeRO demands.
        device_type: ``cpu`` or ``cuda``; on CUDA torch's fused kernel is used.
    """
    common: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
        optimizer.register_step_pre_hook(_forget_powers)
        return optimizer
    return torch.optim.AdamW(groups, fused=device_type == "cuda", **common)


def _forget_powers(optimizer: Any, *_: object) -> None:
    """Make the bias correction of the coming update a function of its step, whatever was computed before.

    DeepSpeedCPUAdam keeps beta^t by one fp32 product a step while it runs, and takes ``std::pow`` after a resume
    (``Adam_Optimizer::IncrementStep`` of DeepSpeed 0.19.8): the second update after a resume differed by some 1e-9. An
    update of nothing at step 0 makes it take ``std::pow`` always.
    """
    nothing = torch.zeros(0)
    group = optimizer.param_groups[0]
    optimizer.ds_opt_adam.adam_update(
        *(optimizer.opt_id, 0, group["lr"], *group["betas"], group["eps"], group["weight_decay"], True),
        *(nothing, nothing, nothing, nothing),
    )

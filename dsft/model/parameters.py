"""Which parameters are trained, and with which weight decay. Names are those of the Hugging Face model."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dsft.constants import MODEL_PREFIX
from dsft.errors import ConfigError


def hf_name(parameter_name: str) -> str:
    """Name of a parameter of ``PackedCausalLM`` in the Hugging Face model (checkpoints, logs and exports use it)."""
    return parameter_name.removeprefix(MODEL_PREFIX)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 holds only a slice of it (``ds_shape`` is DeepSpeed's)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training every parameter whose name matches one of the fnmatch ``patterns``.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    parameters = {hf_name(name): parameter for name, parameter in model.named_parameters()}
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            raise ConfigError(
                f"train.freeze: the pattern {pattern!r} matches no parameter of the model; its parameters are named "
                f"like {', '.join(list(parameters)[:3])}."
            )
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(
            f"train.freeze: the patterns {list(patterns)} freeze every parameter; nothing is left to train."
        )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups over the trained parameters: matrices with ``weight_decay``, vectors without.

    Norms, biases and other parameters of fewer than two dimensions have no decay. An empty group is left out. Each
    group carries ``names`` (Hugging Face names, in the order of ``params``) and ``name`` (``decay`` or ``no_decay``).
    """
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [], "names": [], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[0 if len(full_shape(parameter)) >= 2 else 1]
            group["params"].append(parameter)
            group["names"].append(hf_name(name))
    return [group for group in groups if group["params"]]


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trained) parameters of the whole model; tied ones count once."""
    sizes = [(math.prod(full_shape(parameter)), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 manages this parameter (each rank holds a slice between uses)."""
    return hasattr(parameter, "ds_id")

"""Values of new weights: random ones that do not depend on the world size, and rows of new tokens."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dsft.errors import ModelError
from dsft.model.parameters import is_partitioned


def initialise(hf: Any, seed: int) -> None:
    """Random weights by the model's own rules, each module's from (seed, module name).

    transformers draws from torch's global generator in an order that differs between plain and partitioned creation;
    here every module has its own draw, so that a seed gives the same weights under every ZeRO stage and world size.
    """
    seen: set[int] = set()
    devices = {parameter.device for parameter in hf.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)), torch.no_grad():
        for owner, name, module in _children_first(hf, hf, ""):
            own = list(module.parameters(recurse=False))
            if own and all(id(parameter) in seen for parameter in own):
                continue  # a tied head: its embedding has been initialised
            seen.update(id(parameter) for parameter in own)
            # A module's rule may also write the parameters of its direct children (scaled output projections).
            touched = own + [parameter for child in module.children() for parameter in child.parameters(recurse=False)]
            torch.manual_seed(_seed_of(seed, name))
            with gathered(touched, modify=True):
                owner._init_weights(module)


def _children_first(owner: Any, module: nn.Module, name: str) -> Iterator[tuple[Any, str, nn.Module]]:
    """(model whose rules apply, name, module), children before parents, as transformers walks a model."""
    from transformers import PreTrainedModel

    for child_name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        yield from _children_first(child_owner, child, f"{name}.{child_name}".removeprefix("."))
    yield owner, name, module


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} initialise {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def gathered(parameters: Sequence[torch.Tensor], modify: bool) -> Iterator[None]:
    """Whole values of ``parameters`` inside the context on every rank, partitioned by ZeRO-3 or not.

    With ``modify``, what rank 0 wrote is kept by all. Collective under ZeRO-3.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


def resize_vocabulary(hf: Any, num_rows: int, first_new: int, end_new: int) -> None:
    """Let the model have ``num_rows`` token rows; rows [first_new, end_new) become the mean of rows [0, first_new).

    Input embedding, output embedding (tied or not) and output bias. Works on partitioned models.
    """
    hf.resize_token_embeddings(num_rows, mean_resizing=False)
    modules = [hf.get_input_embeddings(), hf.get_output_embeddings()]
    if any(module is None for module in modules):
        raise ModelError(f"{hf.config.model_type} has no output embedding: it is not a causal language model.")
    seen: set[int] = set()
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            with gathered([parameter], modify=True), torch.no_grad():
                parameter[first_new:end_new] = parameter[:first_new].float().mean(dim=0).to(parameter.dtype)

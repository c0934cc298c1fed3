"""What of a model decides its memory, read from a copy without storage: parameters, and what autograd would save.

The activations are not a formula for one architecture. The model runs on torch's ``meta`` device, which computes shapes
only, and every tensor that autograd would keep for the backward pass is counted by its storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsft.model.flops import ModelCost, cost_of

_ATTENTION = "dsft_estimate"
_TRACED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        num_parameters: all, tied ones once. num_trained: those that are not frozen.
        parameter_sizes: elements of each parameter.
        largest_layer: elements of the largest module that ZeRO-3 gathers for one forward.
        head_parameters: elements of the output embedding; head_trained: it is not frozen.
        hidden_size, vocab_size: of the output embedding.
        activation_bytes_per_token: kept for the backward pass by everything below the head.
        checkpointed_bytes_per_token: the same with activation checkpointing (the layers' inputs).
        layer_bytes_per_token: the layer that keeps most.
        largest_activation_bytes_per_token: the largest tensor that is kept.
        cost: operations.
    """

    num_parameters: int
    num_trained: int
    parameter_sizes: tuple[int, ...]
    largest_layer: int
    head_parameters: int
    head_trained: bool
    hidden_size: int
    vocab_size: int
    activation_bytes_per_token: float
    checkpointed_bytes_per_token: float
    layer_bytes_per_token: float
    largest_activation_bytes_per_token: float
    cost: ModelCost


class _FusedAttention(torch.autograd.Function):
    """The tensors that a fused attention kernel keeps (query, key, value, output, log-sum-exp), and no arithmetic.

    What scaled_dot_product_attention and the variable-length kernel save on their fused paths, whatever the documents.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)  # the kernels' layout
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def model_shape(
    hf_config: Any, dtype: torch.dtype, frozen: tuple[str, ...] = (), is_masked: bool = False
) -> ModelShape:
    """Sizes of the model that ``hf_config`` describes. Nothing is allocated, and no GPU is needed.

    Args:
        frozen: fnmatch patterns of parameters that are not trained (``train.freeze``).
        is_masked: it is an encoder that learns to predict hidden tokens.
    """
    import copy

    from dsft.model.auto import auto_class
    from dsft.model.parameters import freeze

    with torch.device("meta"):
        hf = auto_class(is_masked).from_config(copy.deepcopy(hf_config), dtype=dtype)
    freeze(hf, frozen)
    head = hf.get_output_embeddings().weight
    layers = _layers(hf)
    saved, inputs, per_layer, largest = _saved_bytes(hf, layers)
    return ModelShape(
        num_parameters=sum(p.numel() for p in hf.parameters()),
        num_trained=sum(p.numel() for p in hf.parameters() if p.requires_grad),
        parameter_sizes=tuple(p.numel() for p in hf.parameters()),
        largest_layer=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in hf.modules()),
        head_parameters=head.numel(),
        head_trained=bool(head.requires_grad),
        hidden_size=head.shape[1],
        vocab_size=head.shape[0],
        activation_bytes_per_token=saved / _TRACED_TOKENS,
        checkpointed_bytes_per_token=(saved - sum(per_layer) + inputs) / _TRACED_TOKENS,
        layer_bytes_per_token=max(per_layer, default=0) / _TRACED_TOKENS,
        largest_activation_bytes_per_token=largest / _TRACED_TOKENS,
        cost=cost_of(hf, is_masked),
    )


def _layers(hf: Any) -> list[torch.nn.Module]:
    """The modules that activation checkpointing recomputes."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]


def _saved_bytes(hf: Any, layers: list[torch.nn.Module]) -> tuple[int, int, list[int], int]:
    """Bytes that one forward keeps: in all, the layers' inputs, inside each layer, the largest tensor."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(_ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, lambda *_, **__: None)
    hf.set_attn_implementation(_ATTENTION)
    known = {_key(parameter) for parameter in hf.parameters()}
    kept: list[torch.Tensor] = []  # alive, so that no storage's address is used again
    inside: list[int] = []
    inputs: list[int] = []
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _key(tensor) not in known:
            known.add(_key(tensor))
            kept.append(tensor)
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    def enter(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        inputs.append(hidden.untyped_storage().nbytes())
        inside.append(-sum(sizes))

    def leave(*_: Any) -> None:
        inside[-1] += sum(sizes)

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    ids = torch.zeros(1, _TRACED_TOKENS, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.device("meta"):
        hf.train()
        # The mask is never built; with one, transformers does not look for packed documents in the position ids.
        hf.base_model(input_ids=ids, position_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum(sizes), sum(inputs), inside, max(sizes)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attention(
    _module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    output = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None

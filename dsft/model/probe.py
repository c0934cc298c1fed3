"""Start-up proof that this model, as installed, keeps documents apart and has the loss it should have.

Lists of model types go stale; so each run asks its own model. Six forwards over some forty tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dsft.errors import ModelError
from dsft.model.attention import PackedDocuments, plain_attention
from dsft.model.packed import PackedCausalLM

LENGTH_A, LENGTH_B = 17, 24
"""Tokens of the two probe documents."""

PEAK_LOGIT = 50.0
"""The head is compared with its logits scaled up to this, where soft caps and scales cannot hide."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest relative error (2-norm) that counts as rounding."""

    hidden: float
    nll: float
    experts: float


_BOUNDS = {
    torch.float32: Bounds(hidden=5e-5, nll=1e-3, experts=1e-6),
    torch.bfloat16: Bounds(hidden=5e-2, nll=5e-2, experts=2e-2),
}


@dataclass(slots=True)
class _Observer:
    """What forward hooks saw: hidden states given to the head, raw logits, and the attention layers' windows."""

    scale: float = 1.0
    hidden: torch.Tensor | None = None
    raw_logits: torch.Tensor | None = None
    documents: PackedDocuments | None = field(default=None)


def prove(model: PackedCausalLM, device: torch.device | str) -> None:
    """Refuse the model unless packing changes nothing and the head computes the model's own loss.

    Every rank calls it (each runs the same forwards, as ZeRO-3 needs). Dropout is off inside; the mode is restored.

    Raises:
        ModelError: naming the model type and what it failed.
    """
    config = model.hf.config.get_text_config()
    name = str(model.hf.config.model_type)
    expected_windows = _expected_windows(config, name, model.is_causal)
    bounds = _BOUNDS[model.head().weight.dtype]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(config.vocab_size), (LENGTH_A + LENGTH_B,), generator=generator).to(device)
    if (padding := getattr(config, "pad_token_id", None)) is not None:
        ids[ids == padding] = (padding + 1) % int(config.vocab_size)  # RoBERTa gives it no position
    changed = ids.clone()
    changed[LENGTH_A - 1] = (changed[LENGTH_A - 1] + 1) % int(config.vocab_size)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _observed(model) as seen:
            packed, _ = _packed_forward(model, ids, [LENGTH_A, LENGTH_B], seen)
            assert seen.documents is not None
            _check_attention_layers(name, seen.documents.windows, expected_windows)
            after_change, _ = _packed_forward(model, changed, [LENGTH_A, LENGTH_B], seen)
            alone, _ = _packed_forward(model, ids[LENGTH_A:], [LENGTH_B], seen)
            _check_isolation(name, packed[LENGTH_A:], after_change[LENGTH_A:], alone, config, bounds)
            _check_against_transformers(name, model, ids[LENGTH_A:], alone, seen, bounds)
    finally:
        model.train(was_training)


def _expected_windows(config: Any, name: str, is_causal: bool) -> list[int | None]:
    """The sliding window of each layer, as the config states it."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and not is_causal:
        window += 1  # an encoder's config counts the tokens on either side, without the token itself
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(
            f"{name}: layers of kind {', '.join(unknown)} carry state across positions or documents, so packed "
            "documents would leak into each other: refused."
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _check_attention_layers(name: str, seen: list[int | None] | None, expected: list[int | None]) -> None:
    seen = seen or []
    if len(seen) != len(expected):
        raise ModelError(
            f"{name}: only {len(seen)} of its {len(expected)} layers use transformers' attention interface; the others "
            "would mix packed documents: refused."
        )
    if seen != expected:
        raise ModelError(
            f"{name}: its config asks for sliding windows {expected} but its attention layers pass {seen}: refused."
        )


def _check_isolation(
    name: str, packed: torch.Tensor, after_change: torch.Tensor, alone: torch.Tensor, config: Any, bounds: Bounds
) -> None:
    """Hidden states of document B, [LENGTH_B, H]: with A, with another A, and without A."""
    experts = _has_experts(config)
    # Experts see their tokens side by side, so a token's place in their product, and its rounding, can change.
    leaked = _relative_error(after_change, packed, typical=experts and bounds.experts > 1e-6)
    if leaked > (bounds.experts if experts else 0.0):
        raise ModelError(
            f"{name}: changing one token of a document changed its neighbour in the same pack (relative {leaked:.1e}): "
            "packed documents leak into each other in this model: refused."
        )
    difference = _relative_error(packed, alone, typical=experts)
    if not difference <= bounds.hidden:
        raise ModelError(
            f"{name}: a document gives other hidden states in a pack than alone (relative {difference:.1e}); the model "
            "ignores position_ids or numbers positions along the row: refused."
        )


def _check_against_transformers(
    name: str, model: PackedCausalLM, ids: torch.Tensor, alone: torch.Tensor, seen: _Observer, bounds: Bounds
) -> None:
    """One document through the model's own forward with plain attention: same hidden states, same loss."""
    experts = _has_experts(model.hf.config.get_text_config())
    with plain_attention(model.hf, "eager"):
        model.hf(input_ids=ids[None], use_cache=False)
        assert seen.hidden is not None
        assert seen.raw_logits is not None
        difference = _relative_error(alone, seen.hidden, typical=experts)
        if not difference <= bounds.hidden:
            raise ModelError(
                f"{name}: packed attention gives other hidden states than the model's own (relative {difference:.1e}); "
                "the model uses an attention feature that would be ignored: refused."
            )
        seen.scale = PEAK_LOGIT / max(float(seen.raw_logits.abs().max()), 1e-6)
        logits = model.hf(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    own = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    _, ours = _packed_forward(model, ids, [len(ids)], seen)
    centre = own.mean()
    difference = _relative_error((ours - centre)[:, None], (own - centre)[:, None], typical=experts)
    if not difference <= bounds.nll:
        raise ModelError(
            f"{name}: the loss of dsft's head differs from that of the model's own logits (relative {difference:.1e}); "
            "the model scales or caps its logits in a way that is not known here: refused."
        )


def _packed_forward(
    model: PackedCausalLM, ids: torch.Tensor, lengths: list[int], seen: _Observer
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [L, H] before the head's scale, nll of all rows but the last [L - 1])."""
    device = ids.device
    length = len(ids)
    output = model(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths]).to(device)[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        max_seqlen=max(lengths),
        rows=torch.arange(length - 1, device=device),
        targets=ids[1:],
        row_weight=torch.ones(length - 1, device=device),
        num_tokens=length,
    )
    assert seen.hidden is not None
    return seen.hidden, output.row_nll


@contextlib.contextmanager
def _observed(model: PackedCausalLM) -> Iterator[_Observer]:
    """Hooks that note what reaches the head and, from the observer's ``scale``, enlarge it."""
    seen = _Observer()

    def before_decoder(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.documents = kwargs.get("dsft_documents")
        if seen.documents is not None:
            seen.documents.windows = []

    def before_head(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.hidden = args[0].reshape(-1, args[0].shape[-1]).clone()
        return (args[0] * seen.scale, *args[1:])

    def after_head(_module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):
            seen.raw_logits = output

    hooks = [
        model.hf.base_model.register_forward_pre_hook(before_decoder, with_kwargs=True),
        model.head().register_forward_pre_hook(before_head),
        model.head().register_forward_hook(after_head),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _relative_error(value: torch.Tensor, reference: torch.Tensor, typical: bool = False) -> float:
    """Error of the rows [n, d] relative to the reference's root mean square row: in the 2-norm, or of the typical row.

    Rounding can send a single token to another expert and change its row altogether; the median looks past that.
    """
    value, reference = value.double(), reference.double()
    errors = (value - reference).norm(dim=1)
    error = errors.median() if typical else errors.square().mean().sqrt()
    return float(error / reference.norm(dim=1).square().mean().sqrt())


def _has_experts(config: Any) -> bool:
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, key, None) or 0) > 1 for key in keys)

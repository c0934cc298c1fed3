"""Attention over packed documents: each document sees itself and nothing else.

Registered with transformers under the name ``dsft_varlen``. The borders travel as one keyword argument of the model's
forward (``dsft_documents``); without it the attention raises, because every other way of telling a model where
documents begin (position ids, a 2-D mask) is silently ignored by some models.

Two paths: torch's variable-length kernel (CUDA, bf16 or fp16), and one ``scaled_dot_product_attention`` per document.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsft.errors import ModelError

ATTENTION_NAME = "dsft_varlen"

_REFUSED_ARGUMENTS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "an attention position bias",
    "indices": "sparse attention indices",
    "block_indices": "sparse attention indices",
    "encoder_hidden_states": "cross-attention",
}
"""Keyword arguments by which a model asks for arithmetic that is not done here."""


@dataclass(slots=True)
class PackedDocuments:
    """Where the documents of one row lie.

    Attributes:
        cu_seqlens: int32[S + 1] on the model's device, borders of the documents, from 0 to the row's length.
        max_seqlen: longest document in tokens.
        borders: ``cu_seqlens`` as Python integers for the path that runs one call per document; None selects the
            variable-length kernel, which never asks the device for a number.
        is_causal: a token sees itself and those before it; otherwise its whole document.
        windows: when a list, each attention call appends the sliding window it was given (the start-up probe reads it).
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    borders: tuple[int, ...] | None
    is_causal: bool = True
    windows: list[int | None] | None = field(default=None)


def register_attention() -> None:
    """Make ``dsft_varlen`` known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _no_mask)


@contextlib.contextmanager
def plain_attention(hf: Any, name: str) -> Iterator[None]:
    """Inside: the model computes attention as transformers does by ``name`` (generation, comparison); after: packed.

    transformers' own paths know caches and padding masks, which packed attention refuses.
    """
    hf.set_attn_implementation(name)
    try:
        yield
    finally:
        hf.set_attn_implementation(ATTENTION_NAME)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Stands in for transformers' mask builder: the document borders say everything a mask would."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    dsft_documents: PackedDocuments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each document of one packed row, as transformers' attention interface calls it.

    Args:
        module: the calling attention layer; only its name and ``is_causal`` are read.
        query: [1, query heads, L, D]; key, value: [1, key/value heads, L, D or Dv] (grouped-query when fewer).
        attention_mask: must be None.
        sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it (and after it, unless
            attention is causal).
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        [1, L, query heads, Dv], and None for the attention weights.

    Raises:
        ModelError: no document borders, or the model asks for something that would be ignored here.
    """
    _refuse_unsupported(module, attention_mask, is_causal, dsft_documents, kwargs)
    assert dsft_documents is not None
    if dsft_documents.windows is not None:
        dsft_documents.windows.append(sliding_window)
    if sliding_window is not None and sliding_window >= dsft_documents.max_seqlen:
        sliding_window = None
    if dsft_documents.borders is None:
        if softcap is not None or dropout > 0.0:
            raise ModelError(
                f"{type(module).__name__} uses attention soft-capping or dropout, which torch's variable-length kernel "
                "does not have: set model.attention to sdpa."
            )
        return _kernel_attention(query, key, value, scaling, sliding_window, dsft_documents), None
    return _per_document_attention(query, key, value, scaling, sliding_window, softcap, dropout, dsft_documents), None


def _refuse_unsupported(
    module: nn.Module,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    documents: PackedDocuments | None,
    kwargs: dict[str, Any],
) -> None:
    name = type(module).__name__
    if documents is None:
        raise ModelError(
            f"{name} reached the packed attention without document borders: this model does not pass its forward's "
            "keyword arguments on to its attention layers, so its documents could not be kept apart. Use another model."
        )
    if attention_mask is not None:
        raise ModelError(f"{name} passes an attention mask of its own, which packed attention would ignore: refused.")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if causal != documents.is_causal:
        raise ModelError(
            f"{name} is causal, and objective mlm needs attention in both directions: refused."
            if causal
            else f"{name} attends in both directions, and next tokens must be predicted without seeing them: refused. "
            "Encoders are trained with objective mlm."
        )
    for argument, meaning in _REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise ModelError(f"{name} uses {meaning} ({argument}), which packed attention does not compute: refused.")


def _kernel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    documents: PackedDocuments,
) -> torch.Tensor:
    """torch's variable-length kernel over the whole row: [1, H, L, D] in, [1, L, H, Dv] out, no device sync."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    left = -1 if sliding_window is None else sliding_window - 1
    right = 0 if documents.is_causal else left
    output = varlen_attn(
        query,
        key,
        value,
        documents.cu_seqlens,
        documents.cu_seqlens,
        documents.max_seqlen,
        documents.max_seqlen,
        scale=scaling,
        window_size=(left, right),
        **options,
    )
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


def _per_document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    dropout: float,
    documents: PackedDocuments,
) -> torch.Tensor:
    """One attention call per document: [1, H, L, D] in, [1, L, H, Dv] out."""
    assert documents.borders is not None
    is_causal = documents.is_causal
    outputs = []
    for start, end in itertools.pairwise(documents.borders):
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        window = sliding_window if sliding_window is not None and sliding_window < end - start else None
        if softcap is not None:
            outputs.append(_soft_capped_attention(q, k, v, scaling, window, softcap, dropout, is_causal))
            continue
        mask = None if window is None else _window_mask(end - start, window, is_causal, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=is_causal and mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _window_mask(length: int, window: int | None, is_causal: bool, device: torch.device) -> torch.Tensor:
    """bool[length, length], True where row (query) may see column (key)."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    if window is not None:
        seen = seen.triu_(1 - window).tril_(window - 1)
    return seen.tril_() if is_causal else seen


def _soft_capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float,
    dropout: float,
    is_causal: bool,
) -> torch.Tensor:
    """Attention of one document with tanh soft-capping, computed plainly (Gemma 2, arXiv 2408.00118, section 2)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap)) * softcap
    scores = scores.masked_fill(~_window_mask(query.shape[2], window, is_causal, query.device), float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value

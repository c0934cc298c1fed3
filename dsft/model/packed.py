"""The trained module: a Hugging Face causal model run over packed documents, with the loss in its head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from dsft.errors import ModelError
from dsft.model.attention import ATTENTION_NAME, PackedDocuments, register_attention
from dsft.model.head import MaskedLMHead, install_head
from dsft.model.router import router_loss, wants_router_loss


class PackedOutput(NamedTuple):
    """What one micro-batch gives (a tuple: DeepSpeed's hooks walk the outputs of modules).

    Attributes:
        loss: fp32 scalar, ``sum(row_weight * nll)``.
        row_nll: fp32[n], unweighted and without gradient.
        row_correct: bool[n], whether the model's first choice is the target.
        aux_loss: fp32 scalar, the router loss times the micro-batch's document tokens; 0 for models without one.
    """

    loss: torch.Tensor
    row_nll: torch.Tensor
    row_correct: torch.Tensor
    aux_loss: torch.Tensor


class PackedCausalLM(nn.Module):
    """Wraps a Hugging Face model; its only child is ``hf``, whose head is replaced in place.

    Args:
        hf: a causal language model of transformers.
        use_kernel: run attention through torch's variable-length kernel (CUDA, half precision); otherwise one call per
            document.
    """

    is_causal = True
    """Whether a token sees only what is before it, and predicts what comes next."""

    def __init__(self, hf: Any, use_kernel: bool = False) -> None:
        super().__init__()
        _use_packed_attention(hf)
        if hf.get_output_embeddings() is None or hf.base_model is hf:
            raise ModelError(
                f"{hf.config.model_type} is not a decoder or encoder with an output embedding on top: it cannot be "
                "trained."
            )
        install_head(hf)
        self.hf = hf
        self.has_router_loss = wants_router_loss(hf)
        self.use_kernel = use_kernel

    def head(self) -> MaskedLMHead:
        """The head, which lives under its Hugging Face name inside ``hf``."""
        head = self.hf.get_output_embeddings()
        assert isinstance(head, MaskedLMHead)
        return head

    def documents(self, cu_seqlens: torch.Tensor, max_seqlen: int) -> PackedDocuments:
        """Document borders for the attention layers. Without the kernel on CUDA this waits for the device once."""
        borders = None if self.use_kernel else tuple(cu_seqlens.tolist())
        return PackedDocuments(cu_seqlens, max_seqlen, borders, self.is_causal)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        rows: torch.Tensor,
        targets: torch.Tensor,
        row_weight: torch.Tensor,
        num_tokens: int | None = None,
    ) -> PackedOutput:
        """Loss of one packed row; shapes as in ``dsft.batch.types.PackedBatch``.

        ``num_tokens`` (document tokens, without padding) is needed by models with a router loss only.
        """
        decoder = self.hf.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            dsft_documents=self.documents(cu_seqlens, max_seqlen),
            **({"output_router_logits": True} if self.has_router_loss else {}),
        )
        loss, row_nll, row_correct = self.head()(decoder.last_hidden_state, rows, targets, row_weight)
        if not self.has_router_loss:
            return PackedOutput(loss, row_nll, row_correct, loss.new_zeros(()))
        assert num_tokens is not None, "a model with a router loss needs the number of document tokens"
        return PackedOutput(loss, row_nll, row_correct, router_loss(self.hf, decoder.router_logits, num_tokens))


def _use_packed_attention(hf: Any) -> None:
    """Select the packed attention; transformers only logs when a model's own attention code ignores the choice."""
    register_attention()
    try:
        hf.set_attn_implementation(ATTENTION_NAME)
    except ValueError as error:
        raise ModelError(f"{hf.config.model_type} does not accept packed attention, refused: {error}") from error
    if hf.config._attn_implementation != ATTENTION_NAME:
        raise ModelError(
            f"{hf.config.model_type} does not let its attention be replaced (transformers' attention interface), so "
            "its packed documents could not be kept apart: refused."
        )

"""The trained module for encoders: a Hugging Face masked language model over packed documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsft.errors import ModelError
from dsft.model.packed import PackedCausalLM, PackedOutput
from dsft.model.positions import first_position


class PackedMaskedLM(PackedCausalLM):
    """Wraps an encoder with its own masked-language-modelling head (transform, bias); only the vocabulary projection is
    replaced, in place, by one that computes the loss of the chosen rows."""

    is_causal = False

    def __init__(self, hf: Any, use_kernel: bool = False) -> None:
        super().__init__(hf, use_kernel)
        if self.has_router_loss:
            raise ModelError(f"{hf.config.model_type}: a router loss is not computed for encoders: refused.")
        hf.config.architectures = [type(hf).__name__]  # so that an export knows which head it has
        tables = [
            module
            for path, module in hf.named_modules()
            if isinstance(module, nn.Embedding) and "position" in path.rpartition(".")[2]
        ]
        self.first_position = max((first_position(table) for table in tables), default=0)

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
        """As ``PackedCausalLM.forward``, through the model's own head: its code hands one tensor to the projection."""
        head = self.head()
        head.asked = (rows, targets, row_weight)
        try:
            output = self.hf(
                input_ids=input_ids,
                position_ids=position_ids + self.first_position,
                dsft_documents=self.documents(cu_seqlens, max_seqlen),
            )
        finally:
            head.asked = None
        loss, row_nll, row_correct = output.logits
        return PackedOutput(loss, row_nll, row_correct, loss.new_zeros(()))

"""Values at the seams of batching."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsft.sampling.types import Pieces, StepPlan


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch of one rank: documents side by side in a single row. CPU tensors until ``to``.

    Attributes:
        input_ids: int64[1, L].
        position_ids: int64[1, L], restarting at 0 in each document (at the piece's start, not the document's).
        cu_seqlens: int32[S + 1], borders of the documents; the padding tail, if any, is the last document; ends at L.
        max_seqlen: longest document in tokens (a Python int, so that no device is asked).
        rows: int64[n], ascending positions in [0, L) that are supervised.
        targets: int64[n], the token each row predicts.
        row_weight: float32[n], factor of each row in the loss sum.
        row_source: int64[n], source of each row (position in the configuration).
        pieces: what the row is made of, in order (empty for a filler).
        num_tokens: document tokens; num_padding_tokens: L minus these; both 0 and L for a filler.
        weight_sum: sum of row_weight in fp64.
        data_hash: 63-bit sum over pieces of hash(source, shard, document, start, crc32 of the token bytes really put in
            ``input_ids``); 0 for a filler.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    rows: torch.Tensor
    targets: torch.Tensor
    row_weight: torch.Tensor
    row_source: torch.Tensor
    pieces: Pieces
    num_tokens: int
    num_padding_tokens: int
    is_filler: bool
    weight_sum: float
    data_hash: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This rank's micro-batches of one optimizer step, and the plan they come from (equal on all ranks)."""

    plan: StepPlan
    micro_batches: tuple[PackedBatch, ...]


def model_inputs(batch: PackedBatch, device: torch.device) -> dict[str, torch.Tensor | int]:
    """The keyword arguments of ``PackedCausalLM.forward`` for ``batch``, on ``device``."""
    tensors = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "rows": batch.rows,
        "targets": batch.targets,
        "row_weight": batch.row_weight,
    }
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {**moved, "max_seqlen": batch.max_seqlen, "num_tokens": batch.num_tokens}

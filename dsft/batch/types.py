"""Values at the seams of batching."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsft.sampling.types import Pieces, StepPlan


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch of one rank: documents side by side in a single row. CPU tensors.

    Integers are int32, half the bytes to write, to keep and to send to a device; the model gets int64.

    Attributes:
        input_ids: int32[1, L].
        position_ids: int32[1, L], restarting at 0 in each document (at the piece's start, not the document's).
        cu_seqlens: int32[S + 1], borders of the documents; the padding tail, if any, is the last document; ends at L.
        max_seqlen: longest document in tokens (a Python int, so that no device is asked).
        rows: int32[n], ascending positions in [0, L) that are supervised.
        targets: int32[n], the token each row predicts.
        row_weight: float32[n], factor of each row in the loss sum.
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
    """The keyword arguments of ``PackedCausalLM.forward`` for ``batch``, on ``device``: token numbers as int64."""
    numbers = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "rows": batch.rows,
        "targets": batch.targets,
    }
    moved = {name: tensor.to(device, non_blocking=True).long() for name, tensor in numbers.items()}
    return {
        **moved,
        "cu_seqlens": batch.cu_seqlens.to(device, non_blocking=True),
        "max_seqlen": batch.max_seqlen,
        "row_weight": batch.row_weight.to(device, non_blocking=True),
        "num_tokens": batch.num_tokens,
    }


def row_sources(batch: PackedBatch, device: torch.device) -> torch.Tensor:
    """Source of each supervised row (position in the configuration), int32[n] on ``device``.

    Found by its piece: a column of them would be a sixth of all that the loader writes.
    """
    rows, borders = batch.rows.to(device, non_blocking=True), batch.cu_seqlens.to(device, non_blocking=True)
    of_pieces = torch.from_numpy(batch.pieces.source).to(device, non_blocking=True)
    return of_pieces[torch.bucketize(rows, borders, right=True) - 1]

"""One optimizer step: the exact weighted mean over all supervised tokens of the global batch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dsft.batch.types import PackedBatch, StepBatch, model_inputs, row_sources
from dsft.train.control import Agreement

if TYPE_CHECKING:
    from dsft.train.saving import Saver


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did on this rank.

    Attributes:
        source_loss: float64[2, num_sources] on the device: weighted sum of the loss, and sum of weights, of this rank's
            rows by source. Still on the device: reading it waits for the step.
        applied: the weights changed. False on all ranks together.
        not_finite: the update was skipped because a loss or gradient was not finite.
        grad_norm: global gradient norm before clipping; infinite when not finite.
    """

    source_loss: torch.Tensor
    applied: bool
    not_finite: bool
    grad_norm: float


def train_step(
    engine: Any,
    batch: StepBatch,
    agreed: Agreement,
    saver: Saver,
    *,
    lr: float,
    num_ranks: int,
    num_sources: int,
    seed: int,
    step: int,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one update.

    Each micro-batch's loss is sum(row_weight * R / N * nll) (a router loss is weighted by document tokens): the factor
    is in the weights, so that the head's gradients, made in the forward, are rounded to half precision once. ZeRO
    averages gradients over the R ranks, so their sum over micro-batches and ranks is the gradient of the weighted mean,
    whatever R, packing and accumulation are.
    A loss that is not finite is turned into NaN gradients: after ZeRO's reduction every rank sees a NaN norm and
    skips the update together, without a collective of its own (DeepSpeed skips on an invalid norm in stages 1 to 3).

    Args:
        engine: DeepSpeed engine around a PackedCausalLM, with ``managed_gradient_accumulation`` off.
        agreed: the step's control message; ``weight`` is N.
        saver: a save may still be reading what the update changes.
        seed: the run's seed; every micro-batch's generators start from (seed, step, what it holds).
    """
    device = engine.device
    source_loss = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
    if agreed.weight == 0.0:
        return StepResult(source_loss, applied=False, not_finite=False, grad_norm=0.0)
    scale = torch.tensor(num_ranks / agreed.weight, dtype=torch.float32, device=device)
    aux_scale = num_ranks / agreed.num_tokens
    for micro_batch in batch.micro_batches:
        _seed_generators(seed, step, micro_batch)
        inputs = model_inputs(micro_batch, device)
        output = engine(**{**inputs, "row_weight": inputs["row_weight"] * scale})
        loss = output.loss + output.aux_loss * aux_scale
        engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan), scale_wrt_gas=False)
        _add_by_source(source_loss, micro_batch, output.row_nll)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    saver.before_update()
    engine.step()
    applied = bool(engine.was_step_applied())
    if not applied:
        _drop_gradients(engine)
    grad_norm = engine.get_global_grad_norm()
    norm = math.inf if not applied or grad_norm is None else float(grad_norm)
    return StepResult(source_loss, applied=applied, not_finite=not applied, grad_norm=norm)


def _drop_gradients(engine: Any) -> None:
    """Forget the gradients of a skipped step.

    DeepSpeed 0.19.8 keeps them where ZeRO 1 or 2 offloads the optimizer of a bf16 model: the next gradients would be
    added to NaN, and every later step skipped too.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3 or not getattr(optimizer, "cpu_offload", False):
        return
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None
    for partition in optimizer.single_partition_of_fp32_groups:
        partition.grad.zero_()


def _seed_generators(seed: int, step: int, batch: PackedBatch) -> None:
    """Dropout draws depend on the seed, the step and the documents, never on the rank or on what ran before."""
    digest = hashlib.blake2b(f"{seed}/dropout/{step}/{batch.data_hash}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _add_by_source(totals: torch.Tensor, batch: PackedBatch, row_nll: torch.Tensor) -> None:
    if batch.rows.numel() == 0:
        return
    source = row_sources(batch, totals.device)
    weight = batch.row_weight.to(totals.device, non_blocking=True).double()
    # Not index_add_, which on CUDA adds in another order each time; and an infinite loss stays with its own source.
    is_of = source == torch.arange(totals.shape[1], device=totals.device)[:, None]
    totals[0] += torch.where(is_of, weight * row_nll.double(), 0.0).sum(1)
    totals[1] += torch.where(is_of, weight, 0.0).sum(1)

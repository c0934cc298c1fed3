"""Seconds of a step by a cost model: arithmetic at a stated share of the peak, and bytes over stated links.

Nothing here is measured on the user's machines. It ranks choices and gives the order of a run's cost; the first steps
of the run itself say what is true (``mfu`` in ``metrics.jsonl``), and ``--mfu`` takes that number back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsft.advise.machines import HOST_MEMORY_BANDWIDTH, NVME_BANDWIDTH, PCIE_BANDWIDTH, Machines
from dsft.advise.memory import Settings
from dsft.advise.shape import ModelShape

ADAM_BYTES = 30
"""Host memory traffic of CPU Adam per parameter: gradient, fp32 weight and two moments read (16), three written (12),
and the weight in bf16 written (2)."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step, by cause.

    Attributes:
        compute: forward and backward. exposed_communication: what is left of it beside the arithmetic.
        offload: optimizer on the CPU, and copies between device, host and disk that nothing hides.
    """

    compute: float
    exposed_communication: float
    offload: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed_communication + self.offload


def step_time(
    shape: ModelShape,
    settings: Settings,
    machines: Machines,
    *,
    packs: int,
    pack_tokens: int,
    document_tokens: int,
    achieved_flops: float,
) -> StepTime:
    """Time of a step of ``packs`` packs.

    Args:
        document_tokens: length of a typical document, on which attention's cost depends.
        achieved_flops: operations a second that a device reaches in matrix products while it computes.
    """
    micro_packs = settings.micro_batch_tokens // pack_tokens
    micro_batches = math.ceil(packs / (machines.num_ranks * micro_packs))
    tokens = micro_batches * settings.micro_batch_tokens  # of the busiest rank, which all others wait for
    cost = shape.cost
    layers = cost.flops_per_token + cost.flops_per_token_pair * document_tokens
    recomputed = 4 / 3 if settings.checkpointing else 1.0
    flops = tokens * (layers * recomputed + cost.flops_per_row * settings.supervised_share)
    compute = flops / achieved_flops
    communication = _sent_bytes(shape, settings, micro_batches) / machines.collective_bandwidth
    overlapped = bool(settings.zero.get("overlap_comm", settings.stage == 3))
    exposed = max(0.0, communication - compute) if overlapped else communication
    return StepTime(compute, exposed, _offload_seconds(shape, settings, machines, micro_batches))


def _sent_bytes(shape: ModelShape, settings: Settings, micro_batches: int) -> float:
    """Bytes that each rank sends in a step; a ring moves (R - 1) / R of the whole for a gather or a reduce-scatter."""
    ring = (settings.num_ranks - 1) / settings.num_ranks
    weights = shape.num_parameters * settings.dtype_bytes
    gradients = shape.num_trained * settings.communication_bytes
    if settings.stage == 3:
        return ring * micro_batches * (2 * weights + gradients)
    reductions = micro_batches if settings.stage == 2 else 1
    return ring * (weights + gradients * reductions)


def _offload_seconds(shape: ModelShape, settings: Settings, machines: Machines, micro_batches: int) -> float:
    """Copies and CPU work that the next micro-batch has to wait for (taken as not hidden at all)."""
    own = shape.num_trained / settings.num_ranks
    own_weights = shape.num_parameters / settings.num_ranks * settings.dtype_bytes
    copies = adam = disk = 0.0
    optimizer, weights = settings.place_of("offload_optimizer"), settings.place_of("offload_param")
    if optimizer != "device":
        copies += own * settings.accumulation_bytes * micro_batches + own_weights
        adam = own * machines.devices_per_host * ADAM_BYTES / HOST_MEMORY_BANDWIDTH
    if weights != "device":
        copies += 2 * own_weights * micro_batches
    if optimizer == "nvme":
        disk += 2 * 12 * own * machines.devices_per_host
    if weights == "nvme":
        disk += 2 * own_weights * machines.devices_per_host * micro_batches
    over_bus = 0.0 if settings.on_cpu else copies / PCIE_BANDWIDTH
    return over_bus + adam + disk / NVME_BANDWIDTH

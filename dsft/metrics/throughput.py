"""Rates and memory of a span of steps."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

import torch

from dsft.metrics.peaks import peak_flops


class Throughput:
    """Turns counted tokens and seconds into rates.

    Args:
        flops_per_token, flops_per_token_pair, flops_per_row: cost of the model (``dsft.model.flops.ModelCost``).
        device: of this rank's model.
        dtype: ``fp32`` or ``bf16``.
        num_ranks: devices in the run.
    """

    def __init__(
        self,
        flops_per_token: float,
        flops_per_token_pair: float,
        flops_per_row: float,
        *,
        device: torch.device,
        dtype: str,
        num_ranks: int,
    ) -> None:
        self._flops = (flops_per_token, flops_per_token_pair, flops_per_row)
        self._device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name, dtype)
        self._peak = None if peak is None else peak * num_ranks

    def rates(self, counts: Mapping[str, int], num_pairs: int, seconds: float) -> dict[str, Any]:
        """Tokens per second by kind, MFU (only document tokens and supervised rows count as useful), memory.

        Args:
            counts: tokens by kind: supervised, other, padding, idle.
            num_pairs: sum of squared document lengths.
            seconds: training time they took.
        """
        per_token, per_pair, per_row = self._flops
        useful_tokens = counts["supervised"] + counts["other"]
        flops = per_token * useful_tokens + per_pair * num_pairs + per_row * counts["supervised"]
        rates: dict[str, Any] = {f"{kind}_tokens_per_second": count / seconds for kind, count in counts.items()}
        rates["padding_share"] = counts["padding"] / max(1, useful_tokens + counts["padding"])
        rates["tflops_per_second"] = flops / seconds / 1e12
        rates["mfu"] = None if self._peak is None else flops / seconds / self._peak
        rates["peak_memory_bytes"] = peak_memory_bytes(self._device)
        return rates


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: allocated on the device for CUDA, resident in this process for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

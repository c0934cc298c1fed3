"""Ranks that compute more slowly than the others: found by their own work, named with their host, never ended.

All ranks of a step take equally long, because each waits for the slowest in every layer's collective. What differs is
the time between two collectives. The output head is such a part in every model and ZeRO stage: its forward computes
logits, loss and both gradients of the supervised rows without a collective, so its seconds a row compare the ranks'
devices at the run's own work. What else may be slow on a host (its disk, its network) is not seen here.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsft.batch.types import StepBatch
from dsft.model.head import MaskedLMHead

if TYPE_CHECKING:
    from dsft.dist import Groups
    from dsft.metrics.recorder import Recorder

COMPARE_STEPS = 10
"""Steps whose median is compared: a pause of one step is not a slow rank."""
SLOW_FACTOR = 1.5
"""Seconds a row over the median of all ranks. Equal devices differ by some percent (clocks, rows a call)."""
NUM_IN_ROW = 3
"""Comparisons in a row before a rank is named."""


class HeadTimer:
    """Time that this rank's output head takes in training; on a device, as the device itself counts it.

    Args:
        model: built and wrapped by DeepSpeed already: its hooks, which gather the weight, run before the clock starts.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._began: Any = None
        self._calls: list[tuple[Any, Any]] = []
        self._steps: list[tuple[list[tuple[Any, Any]], int]] = []
        for module in model.modules():
            if isinstance(module, MaskedLMHead):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end, prepend=True)  # before the weight is given back

    def end_step(self, num_rows: int) -> None:
        """The calls since the last one were those of a step with so many supervised rows."""
        self._steps.append((self._calls, num_rows))
        self._calls = []

    def take(self) -> float | None:
        """Seconds a row, median of the steps since the last call; None: none had a row.

        On a device, all these steps have been waited for.
        """
        seconds = [sum(self._seconds(*call) for call in calls) / rows for calls, rows in self._steps if rows]
        self._steps = []
        return statistics.median(seconds) if seconds else None

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) / 1000.0 if self._is_cuda else end - begin)

    def _begin(self, module: torch.nn.Module, inputs: Any) -> None:
        self._began = self._now() if module.training else None

    def _end(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._began is not None:
            self._calls.append((self._began, self._now()))

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class SlowRanks:
    """Compares the ranks every :data:`COMPARE_STEPS` steps and says who is slow, once, until it is no more.

    Args:
        model, device: of this rank, as for :class:`HeadTimer`.
        recorder: where it is said.
    """

    def __init__(self, groups: Groups, model: torch.nn.Module, device: torch.device, recorder: Recorder) -> None:
        self._groups, self._recorder = groups, recorder
        self._timer = HeadTimer(model, device) if groups.size > 1 else None
        self._hosts: list[str] = groups.all_gather_object(socket.gethostname())
        self._num_steps = 0
        self._num_slow = [0] * groups.size

    def observe(self, step: int, batch: StepBatch) -> None:
        """Take a step that was just run. Collective."""
        if self._timer is None:
            return
        self._timer.end_step(sum(int(micro_batch.rows.numel()) for micro_batch in batch.micro_batches))
        self._num_steps += 1
        if self._num_steps < COMPARE_STEPS:
            return
        self._num_steps, seconds = 0, self._timer.take()
        picoseconds = np.array([-1 if seconds is None else round(seconds * 1e12)], dtype=np.int64)
        table = self._groups.post(picoseconds).wait()
        seconds_per_row = [None if value < 0 else float(value) * 1e-12 for (value,) in table]
        for rank, factor in enumerate(slowness(seconds_per_row)):
            self.note(step, rank, factor)

    def note(self, step: int, rank: int, factor: float) -> None:
        """Take how slow a rank was in the last comparison (:func:`slowness`)."""
        if factor < SLOW_FACTOR:
            self._num_slow[rank] = 0
            return
        self._num_slow[rank] += 1
        if self._num_slow[rank] == NUM_IN_ROW:
            self._recorder.warn(
                f"slow rank: at step {step}, rank {rank} on {self._hosts[rank]} computes {factor:.1f} times as long as "
                f"the median of {self._groups.size} ranks, for {NUM_IN_ROW * COMPARE_STEPS} steps now, and all others "
                "wait for it. Look at that host: other processes, the clocks and temperature of its device, its power "
                "limit; or leave it out."
            )


def slowness(seconds_per_row: Sequence[float | None]) -> list[float]:
    """Each rank's seconds over the median of all (of two, the faster one); 1.0 where it had no work.

    Args:
        seconds_per_row: by rank; None: it had no supervised row.
    """
    known = [seconds for seconds in seconds_per_row if seconds is not None]
    if not known or (median := statistics.median_low(known)) <= 0.0:
        return [1.0] * len(seconds_per_row)
    return [1.0 if seconds is None else seconds / median for seconds in seconds_per_row]

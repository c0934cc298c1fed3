"""What is written of the steps: one record a logged step, and one line a step of what the model was given."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsft.errors import SaveError
from dsft.metrics.json_lines import JsonLines
from dsft.metrics.throughput import Throughput
from dsft.sampling.types import StepPlan
from dsft.train.control import Agreement
from dsft.train.step import StepResult

if TYPE_CHECKING:
    from pathlib import Path

    from dsft.dist import Groups

DATA_LOG_NAME = "data_log.jsonl"
"""One line a step: the hash of what the model was given. ``data verify-run`` recomputes it from the store."""


class StepLog:
    """Sums over the steps since the last record, reduced over ranks only when a record is due.

    Args:
        groups: process groups; every rank calls :meth:`record` at the same steps.
        source_names: names of the sources in configuration order.
        throughput: turns counts and seconds into rates.
        run_dir: where the log of the per-step hashes goes; None on ranks other than 0.
        attempt: id of this start of the run.
        device: of this rank's model.

    Attributes:
        total_excluded_seconds: evaluations and saves since the start.
        error: the data log could not be written. Kept and not raised, because the other ranks must hear of it too.
    """

    def __init__(
        self,
        groups: Groups,
        source_names: tuple[str, ...],
        throughput: Throughput,
        run_dir: Path | None,
        attempt: str,
        device: torch.device,
    ) -> None:
        self._groups = groups
        self._names = source_names
        self._throughput = throughput
        self._data_log = None if run_dir is None else JsonLines(run_dir / DATA_LOG_NAME)
        self.error: SaveError | None = None
        self.total_excluded_seconds = 0.0
        self._waited_before = 0.0
        self._attempt = attempt
        self._device = device
        self._clear()

    def begin(self) -> None:
        """Training begins now: what came before (loading, an evaluation) is not counted."""
        self._clear()

    def begin_attempt(self, attempt: str) -> None:
        """The steps from now on are of another attempt: the run has gone back to a checkpoint."""
        self._attempt = attempt
        self._clear()

    @property
    def is_empty(self) -> bool:
        """No step was added since the last record."""
        return self._last is None

    def _clear(self) -> None:
        self._last: tuple[int, StepResult, float] | None = None
        self._source_loss = torch.zeros(2, len(self._names), dtype=torch.float64, device=self._device)
        self._counts = {"supervised": 0, "other": 0, "padding": 0, "idle": 0}
        self._started = time.perf_counter()
        self._num_pairs = 0
        self._excluded_seconds = 0.0

    def add(self, step: int, plan: StepPlan, agreed: Agreement, result: StepResult, lr: float) -> None:
        """Count a step that was run with learning rate ``lr``, and write what it was given to the data log."""
        self._last = (plan.stage, result, lr)
        self._source_loss += result.source_loss
        self._counts["supervised"] += agreed.num_supervised
        self._counts["other"] += agreed.num_tokens - agreed.num_supervised
        self._counts["padding"] += agreed.num_padding
        self._counts["idle"] += agreed.num_idle
        self._num_pairs += sum(int(np.square(pack.length, dtype=np.int64).sum()) for pack in plan.packs)
        if self._data_log is not None:
            entry = {"step": step, "attempt": self._attempt, "data_hash": agreed.data_hash, "tokens": agreed.num_tokens}
            try:
                self._data_log.write({**entry, "supervised": agreed.num_supervised, "applied": result.applied})
            except SaveError as error:
                self.error = self.error or error

    def sync(self) -> None:
        """Return once the data log is on the disk: before the checkpoint whose steps it proves is committed."""
        if self._data_log is not None:
            self._data_log.sync()

    def exclude(self, seconds: float) -> None:
        """Leave ``seconds`` (an evaluation, a save) out of the rates."""
        self._excluded_seconds += seconds
        self.total_excluded_seconds += seconds

    def record(self, waited_seconds: float) -> dict[str, Any]:
        """The record of the steps since the last one: loss over all ranks, per source, rates, memory. Collective.

        Stage, learning rate and gradient norm are those of the last step.

        Args:
            waited_seconds: that this rank has waited for data since the start.
        """
        assert self._last is not None, "a record is of at least one step"
        stage, result, lr = self._last
        seconds = max(time.perf_counter() - self._started - self._excluded_seconds, 1e-9)
        totals = self._groups.sum(self._source_loss.flatten().cpu().numpy()).reshape(2, len(self._names))
        weighted, weight = totals[0], totals[1]
        record: dict[str, Any] = {
            "loss": float(weighted.sum() / weight.sum()) if weight.sum() > 0 else None,
            "loss_by_source": {
                name: float(weighted[i] / weight[i]) for i, name in enumerate(self._names) if weight[i] > 0
            },
            "weight_by_source": {name: float(weight[i]) for i, name in enumerate(self._names) if weight[i] > 0},
            "stage": stage,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            "data_wait_seconds": waited_seconds - self._waited_before,
            "seconds": seconds,
            **self._throughput.rates(self._counts, self._num_pairs, seconds),
        }
        self._waited_before = waited_seconds
        self._clear()
        return record

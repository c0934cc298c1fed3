"""The one control message of a step: what every rank must know of all others before it trains.

Each rank sends a few integers with its batch of the *next* step while the present one is computed, on a CPU group, so
that no device waits. All ranks see the same rows and therefore take the same decision: train, stop, finish or fail.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsft.batch.types import StepBatch
from dsft.errors import StoppedEarly, TrainingError

if TYPE_CHECKING:
    from dsft.dist import Groups, PendingControl

_OK, _END, _FAILED, _STOPPED = 0, 1, 2, 3
_FIELDS = ("status", "stop", "save", "plan", "weight", "data_hash", "supervised", "tokens", "padding", "idle")
_HASH_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks agreed on for one step.

    Attributes:
        end: the data is used up; there is no such step.
        stop: somebody asked to stop; the step is not run and the cursor stands before it.
        num_save_tasks_done: tasks of saves that the threads of all ranks have ended.
        weight: N, the sum of all row weights of the global batch (fp64, rank order: the same bits on every rank).
        data_hash: sum over ranks of what their tensors hold, modulo 2**63.
        num_supervised, num_tokens, num_padding, num_idle: tokens of the global batch by kind. ``num_tokens`` are
            document tokens, of which ``num_supervised`` are learned; idle tokens are fillers.
    """

    end: bool
    stop: bool
    num_save_tasks_done: int
    weight: float
    data_hash: int
    num_supervised: int
    num_tokens: int
    num_padding: int
    num_idle: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """A rank's own message, posted and not yet answered."""

    batch: StepBatch | None
    error: Exception | None
    pending: PendingControl


def propose(
    groups: Groups, batch: StepBatch | None, error: Exception | None, *, stop: bool, num_save_tasks_done: int, salt: int
) -> Proposal:
    """Post this rank's message for its next step; every rank calls it once a step, also at the end and on an error.

    Args:
        batch: the step's micro-batches; None at the end of the data or on an error.
        error: what kept this rank from making its batch. It travels, so that no rank waits for one that is gone.
            StoppedEarly asks for a stop, as ``stop`` does: a request ended its waiting for data.
        stop: this process was asked to stop.
        num_save_tasks_done: tasks of saves that this rank's threads have ended (``Saver.num_tasks_done``).
        salt: fingerprint of the stores and the configuration, mixed into the plan's hash.
    """
    is_stopped = isinstance(error, StoppedEarly)
    if error is not None:
        status = _STOPPED if is_stopped else _FAILED
    else:
        status = _END if batch is None else _OK
    row = dict.fromkeys(_FIELDS, 0)
    row["status"], row["stop"], row["save"] = status, int(stop or is_stopped), num_save_tasks_done
    row["plan"] = salt & _HASH_MASK
    if batch is not None:
        micro = batch.micro_batches
        row["plan"] = (batch.plan.plan_hash ^ salt) & _HASH_MASK
        row["weight"] = _float_bits(math.fsum(b.weight_sum for b in micro))
        row["data_hash"] = sum(b.data_hash for b in micro) & _HASH_MASK
        row["supervised"] = sum(int(b.rows.numel()) for b in micro)
        row["tokens"] = sum(b.num_tokens for b in micro)
        row["padding"] = sum(b.num_padding_tokens for b in micro if not b.is_filler)
        row["idle"] = sum(b.num_padding_tokens for b in micro if b.is_filler)
    vector = np.array([row[name] for name in _FIELDS], dtype=np.int64)
    return Proposal(batch=batch, error=error, pending=groups.post(vector))


def agree(groups: Groups, proposal: Proposal) -> Agreement:
    """Wait for all ranks' messages and decide.

    Raises:
        DsftError: what a rank brought, on every rank alike; its other errors as ``Groups.agree`` says.
        TrainingError: the ranks do not plan the same step.
    """
    table = proposal.pending.wait()
    column = {name: table[:, position] for position, name in enumerate(_FIELDS)}
    if (column["status"] == _FAILED).any():  # every rank sees it, so every rank comes to hear the error itself
        groups.agree(proposal.error)
    is_stopped = bool((column["status"] == _STOPPED).any())  # then some ranks have a batch, and no rank takes the step
    if not is_stopped and (len(set(column["plan"].tolist())) > 1 or len(set(column["status"].tolist())) > 1):
        odd = [rank for rank in range(len(table)) if column["plan"][rank] != column["plan"][0]]
        raise TrainingError(
            f"ranks {odd or 'unknown'} plan another step than rank 0: they read another token store, configuration "
            "or version of dsft. Nothing was trained on the disagreement. Compare data.store_dir and the installed "
            "version on those hosts."
        )
    return Agreement(
        end=bool(column["status"][0] == _END) and not is_stopped,
        stop=bool(column["stop"].any()),
        num_save_tasks_done=int(column["save"].min()),
        weight=math.fsum(_bits_float(int(bits)) for bits in column["weight"]),
        data_hash=sum(int(value) for value in column["data_hash"]) & _HASH_MASK,
        num_supervised=int(column["supervised"].sum()),
        num_tokens=int(column["tokens"].sum()),
        num_padding=int(column["padding"].sum()),
        num_idle=int(column["idle"].sum()),
    )


def _float_bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _bits_float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])

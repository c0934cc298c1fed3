"""What a run knows of itself between two steps; all of it is in each checkpoint and equal on all ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

from dsft.errors import CheckpointError
from dsft.sampling.cursor import cursor_from_json, cursor_to_json
from dsft.sampling.types import Cursor


@dataclass(slots=True)
class TrainState:
    """Position and counters of a run.

    Attributes:
        cursor: where the next step begins in the data.
        step: optimizer steps taken, skipped ones included (a skipped step used its data).
        tokens_trained: document tokens of the plan up to here: of those steps, and those that were passed over.
        supervised_trained: supervised tokens of those steps.
        num_skipped: steps whose update was skipped because loss or gradient was not finite, or nothing was supervised.
        num_skipped_in_row: of these, not-finite ones since the last step that was applied.
        overfit: state of the overfitting watch (JSON).
        first_loss: per held-out set, its loss at the run's first evaluation.
        first_bias: per bias test, the value of each of its items at the run's first evaluation.
        is_unmeasured: the evaluation that was due here was ended by a stop; the next start begins with it.
        lr_share: what the schedule had left of the peak learning rate here, warm-up aside; None: not known.
        train_loss: per source, since the last evaluation: [weighted sum of the loss, sum of weights].
        spikes: state of the spike watch (JSON).
        num_roll_backs: how often the run has gone back because of a loss spike.
        tokens_skipped: document tokens that it has passed over then.
    """

    cursor: Cursor
    step: int = 0
    tokens_trained: int = 0
    supervised_trained: int = 0
    num_skipped: int = 0
    num_skipped_in_row: int = 0
    overfit: dict[str, Any] = field(default_factory=dict)
    first_loss: dict[str, float] = field(default_factory=dict)
    first_bias: dict[str, list[float]] = field(default_factory=dict)
    is_unmeasured: bool = False
    lr_share: float | None = None
    train_loss: dict[str, list[float]] = field(default_factory=dict)
    spikes: dict[str, Any] = field(default_factory=dict)
    num_roll_backs: int = 0
    tokens_skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, a copy: a save writes them while training goes on."""
        values = {
            "cursor": cursor_to_json(self.cursor),
            "step": self.step,
            "tokens_trained": self.tokens_trained,
            "supervised_trained": self.supervised_trained,
            "num_skipped": self.num_skipped,
            "num_skipped_in_row": self.num_skipped_in_row,
            "overfit": self.overfit,
            "first_loss": self.first_loss,
            "first_bias": self.first_bias,
            "is_unmeasured": self.is_unmeasured,
            "lr_share": self.lr_share,
            "train_loss": self.train_loss,
            "spikes": self.spikes,
            "num_roll_backs": self.num_roll_backs,
            "tokens_skipped": self.tokens_skipped,
        }
        return copy.deepcopy(values)

    def become(self, other: TrainState) -> None:
        """Take over all of another state."""
        for one in fields(self):
            setattr(self, one.name, getattr(other, one.name))


def state_from_json(values: dict[str, Any]) -> TrainState:
    """Inverse of :meth:`TrainState.to_json`.

    Raises:
        CheckpointError: the cursor is of another order version, or the values are not those of a TrainState.
    """
    cursor = cursor_from_json(values["cursor"])
    try:
        return TrainState(cursor=cursor, **{key: value for key, value in values.items() if key != "cursor"})
    except TypeError as error:
        raise CheckpointError(
            f"the checkpoint's training state cannot be read ({error}): another version of dsft wrote it. Resume with "
            "that version, or start a new run from its weights (model.path)."
        ) from error

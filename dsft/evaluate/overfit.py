"""Overfitting: the held-out loss of a set rises above its best while the training loss of its source still falls.

Pure logic on numbers: no model, no clock. The state is JSON, so that a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MIN_RELATIVE_RISE = 1e-3
"""A held-out loss within 0.1 % of its best is level, not risen: weights jitter that much between two evaluations."""


@dataclass(frozen=True, slots=True)
class SetHistory:
    """What is remembered of one held-out set.

    Attributes:
        best_loss: lowest held-out loss so far (nats per token).
        best_step: optimizer step at which it was measured.
        train_loss_at_best: training loss of the linked source then; None while the source had not been drawn.
        num_rises: evaluations in a row that were overfitted.
    """

    best_loss: float
    best_step: int
    train_loss_at_best: float | None
    num_rises: int


@dataclass(frozen=True, slots=True)
class Overfitting:
    """A set that has been overfitted for ``patience`` evaluations in a row."""

    set_name: str
    message: str


class OverfitWatch:
    """Compares train and held-out loss side by side, one history a set."""

    def __init__(self, patience: int, histories: Mapping[str, SetHistory] | None = None) -> None:
        assert patience >= 1
        self.patience = patience
        self._histories: dict[str, SetHistory] = dict(histories or {})

    def observe(self, set_name: str, step: int, held_out_loss: float, train_loss: float | None) -> Overfitting | None:
        """Take one evaluation of one set; an Overfitting if it is at least the ``patience``-th bad one in a row.

        Bad: held-out loss more than :data:`MIN_RELATIVE_RISE` above its best, and training loss below what it was at
        that best. A training loss that is unknown (None: no linked source, or not drawn since) is never bad. A loss
        that is not finite is a failure of training, reported elsewhere: it leaves the history as it is.
        """
        if not math.isfinite(held_out_loss):
            return None
        history = self._histories.get(set_name)
        if history is None or held_out_loss < history.best_loss:
            self._histories[set_name] = SetHistory(held_out_loss, step, train_loss, num_rises=0)
            return None
        risen = held_out_loss > history.best_loss * (1.0 + MIN_RELATIVE_RISE)
        train_at_best = history.train_loss_at_best
        if train_at_best is None:  # the source was first drawn after the best: count from here
            train_at_best = train_loss
        train_falls = train_loss is not None and train_at_best is not None and train_loss < train_at_best
        num_rises = history.num_rises + 1 if risen and train_falls else 0
        self._histories[set_name] = SetHistory(history.best_loss, history.best_step, train_at_best, num_rises)
        if num_rises < self.patience:
            return None
        message = (
            f"held-out set {set_name!r} is being overfitted: its loss {held_out_loss:.4f} has been above its best "
            f"{history.best_loss:.4f} (step {history.best_step}) for {num_rises} evaluations in a row, while the "
            f"training loss fell from {train_at_best:.4f} to {train_loss:.4f}. Train for fewer epochs, lower the "
            f"learning rate, or use the checkpoint nearest to step {history.best_step}."
        )
        return Overfitting(set_name, message)

    def to_json(self) -> dict[str, Any]:
        """State for the checkpoint."""
        return {name: asdict(history) for name, history in self._histories.items()}

    @classmethod
    def from_json(cls, patience: int, state: Mapping[str, Any]) -> OverfitWatch:
        """A watch that goes on where :meth:`to_json` stood (the patience is the configuration's of today)."""
        return cls(patience, {name: SetHistory(**history) for name, history in state.items()})

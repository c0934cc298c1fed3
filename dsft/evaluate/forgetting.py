"""Forgetting: a reference set's loss above what it was when the run began, before anything was learned."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Forgetting:
    """A set whose loss has risen by more than its limit."""

    set_name: str
    message: str


def forgetting(set_name: str, first_loss: float, loss: float, max_rise: float | None) -> Forgetting | None:
    """Whether ``loss`` (nats a token) is more than ``max_rise`` above ``first_loss``; None: no limit is never passed.

    A loss that is not finite is a failure of training, reported elsewhere.
    """
    if max_rise is None or not math.isfinite(loss) or loss - first_loss <= max_rise:
        return None
    rise = loss - first_loss
    message = (
        f"set {set_name!r} is being forgotten: its loss is {loss:.4f}, {rise:.4f} above the {first_loss:.4f} that it "
        f"was before training (limit: max_rise {max_rise:g}; perplexity x {math.exp(rise):.2f}). Mix in more text of "
        "its kind, or lower the learning rate."
    )
    return Forgetting(set_name, message)

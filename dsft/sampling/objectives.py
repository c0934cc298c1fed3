"""What is learned of a source other than its next token, and how its documents change for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsft.sampling.fim import FillInTheMiddle, FimOrder, fim_order
from dsft.sampling.mlm import MaskedLanguageModelling, MlmOrder, mlm_order

Objective = FillInTheMiddle | MaskedLanguageModelling
ObjectiveOrder = FimOrder | MlmOrder


def order_of(objective: Objective, seed: int, source_name: str) -> ObjectiveOrder:
    """How the documents of a source change in a run."""
    if isinstance(objective, MaskedLanguageModelling):
        return mlm_order(objective, seed, source_name)
    return fim_order(objective, seed, source_name)


def objective_from_json(fields: Mapping[str, Any]) -> Objective:
    """The objective whose fields were written to a log."""
    if "mask_id" in fields:
        return MaskedLanguageModelling(**{**fields, "special_ids": tuple(fields["special_ids"])})
    return FillInTheMiddle(**fields)

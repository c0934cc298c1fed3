"""What ``dsft advise`` knows before it says anything: numbers measured of data and model, and what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Method = Literal["none", "supervised", "unsupervised", "both"]
Task = Literal["narrow", "broad"]
Control = Literal["high", "low"]
Sensitivity = Literal["low", "medium", "high"]


@dataclass(frozen=True, slots=True)
class TextEvidence:
    """Raw text, training part and held-out part.

    Attributes:
        documents, tokens: of the training part, without exact copies.
        held_out_documents: set aside.
        duplicate_share, near_duplicate_share, broken_share: of all rows; the last are wrongly decoded.
        bits_per_byte: of the held-out part under the model before training, with its 95 % interval.
    """

    documents: int
    tokens: int
    held_out_documents: int
    duplicate_share: float
    near_duplicate_share: float
    broken_share: float
    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class PairsEvidence:
    """Prompts with their answers.

    Attributes:
        pairs, tokens: of the training part, without exact copies; tokens with prompts and template.
        held_out_pairs: set aside; prompts that are equal are on one side.
        supervised_share: answer tokens over all tokens.
        duplicate_share, near_duplicate_share, unusable_share: of all rows.
        conflicting_share: of the distinct prompts, those with more than one answer (noise of the labels).
        distinct_answer_share: distinct answers over pairs. common_answer_share: pairs whose answer is one of the 20
            most frequent.
        found_in_text_share: of the answers with five words or more, those of which half or more of the five-word runs
            stand in the raw text; None where there is no text or no such answer.
        response_loss: nats a token of the held-out answers under the model before training.
        f1, f1_interval, exact_match: of its greedy answers. shuffled_f1: of the same answers against the references of
            other prompts, what form alone scores.
    """

    pairs: int
    tokens: int
    held_out_pairs: int
    supervised_share: float
    duplicate_share: float
    near_duplicate_share: float
    unusable_share: float
    conflicting_share: float
    distinct_answer_share: float
    common_answer_share: float
    found_in_text_share: float | None
    response_loss: float
    f1: float
    f1_interval: tuple[float, float]
    exact_match: float
    shuffled_f1: float


@dataclass(frozen=True, slots=True)
class GeneralEvidence:
    """Text of the kind the model was trained on: to compare with, and for replay.

    Attributes:
        tokens: of the training part. bits_per_byte: of the held-out part before training.
    """

    tokens: int
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class Situation:
    """What cannot be measured.

    Attributes:
        goal: in the user's words; it decides nothing and is written beside the result.
        task: narrow: one kind of question; broad: many kinds.
        control: high: answers must keep a form or stay within limits.
        sensitivity: high: the raw text holds what the model must never give out, and nobody has read all of it; medium:
            it may.
        max_device_hours: budget; None: none stated.
    """

    goal: str
    task: Task
    control: Control
    sensitivity: Sensitivity
    max_device_hours: float | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it.

    Attributes:
        num_parameters: of the model.
        text, pairs, general: None where no path was given.
        device_hours: what each method would take on the stated machines; empty where none were stated.
    """

    num_parameters: int
    text: TextEvidence | None
    pairs: PairsEvidence | None
    general: GeneralEvidence | None
    situation: Situation
    device_hours: Mapping[Method, float]

    @property
    def text_tokens(self) -> int:
        """Training tokens of raw text."""
        return 0 if self.text is None else self.text.tokens

    @property
    def num_pairs(self) -> int:
        """Training pairs."""
        return 0 if self.pairs is None else self.pairs.pairs

    @property
    def surprise(self) -> float | None:
        """Bits per byte of the text over those of general text; None where one of them was not given."""
        if self.text is None or self.general is None:
            return None
        return self.text.bits_per_byte / self.general.bits_per_byte

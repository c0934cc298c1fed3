"""The five factors, each with its numbers, what it speaks for, and its risk. They explain; ``rules`` decides."""

from __future__ import annotations

from dataclasses import dataclass

from dsft.advise.evidence import Evidence
from dsft.advise.rules import (
    ENOUGH_PAIRS,
    KNOWN_TEXT_RATIO,
    MIN_PAIRS,
    MIN_TEXT_TOKENS,
    already_right,
    enough_pairs,
    enough_text,
    text_is_news,
)

_COMMON_ANSWERS = 0.5
"""From this share of pairs whose answer is one of twenty, they look like a classification."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor.

    Attributes:
        numbers: what it rests on. speaks_for: a method, or what it leaves open. risk: what may go wrong with it.
    """

    name: str
    numbers: str
    speaks_for: str
    risk: str


def factors(evidence: Evidence) -> tuple[Factor, ...]:
    """Data availability, task specificity, resources, control against flexibility, ethics."""
    return (_data(evidence), _task(evidence), _resources(evidence), _control(evidence), _ethics(evidence))


def _data(e: Evidence) -> Factor:
    said = []
    if e.text is not None:
        said.append(
            f"{e.text.tokens:,} tokens of text in {e.text.documents:,} documents ({e.text.duplicate_share:.1%} of the "
            f"rows are copies and left out, {e.text.near_duplicate_share:.1%} nearly copies)"
        )
    if e.pairs is not None:
        said.append(
            f"{e.pairs.pairs:,} pairs ({e.pairs.duplicate_share:.1%} of the rows are copies and left out, "
            f"{e.pairs.unusable_share:.1%} cannot be used, {e.pairs.conflicting_share:.1%} of the prompts have answers "
            "that differ)"
        )
    able = {(True, True): "both are possible", (True, False): "supervised", (False, True): "unsupervised"}
    speaks_for = able.get((enough_pairs(e), enough_text(e)), "neither")
    risks = []
    if e.num_pairs and e.num_pairs < ENOUGH_PAIRS:
        bridge = "; dsft data bridge makes more out of prose, by rules (docs/recipes.md)"
        may_bridge = enough_text(e) and e.situation.sensitivity != "high"
        risks.append(
            f"overfitting on few pairs ({MIN_PAIRS} to {ENOUGH_PAIRS:,}): early_stop watches it"
            + (bridge if may_bridge else "")
        )
    if e.text_tokens and e.text_tokens < MIN_TEXT_TOKENS:
        risks.append("the text would be learned by heart before it is learned")
    if e.pairs is not None and e.pairs.conflicting_share > 0.05:
        risks.append("noise in the labels: read the prompts with several answers")
    return Factor("data availability", "; ".join(said) or "no data", speaks_for, "; ".join(risks) or "none seen")


def _task(e: Evidence) -> Factor:
    said, risks = [f"task: {e.situation.task} (as stated)"], []
    speaks_for = "pairs and text"
    if e.pairs is not None:
        low, high = e.pairs.f1_interval
        said.append(
            f"before training: answers F1 {e.pairs.f1:.3f} [{low:.3f}, {high:.3f}], of which form alone scores "
            f"{e.pairs.shuffled_f1:.3f}; exact {e.pairs.exact_match:.3f}; loss {e.pairs.response_loss:.2f} nats a token"
        )
        said.append(
            f"{e.pairs.distinct_answer_share:.0%} of the answers are distinct, {e.pairs.common_answer_share:.0%} are "
            "one of the 20 most frequent"
        )
        if e.pairs.found_in_text_share is not None:
            said.append(f"{e.pairs.found_in_text_share:.0%} of the answers stand in the text for half or more")
        if e.situation.task == "broad" and e.pairs.common_answer_share >= _COMMON_ANSWERS:
            risks.append("the task was called broad, and the pairs have few different answers: is it narrow?")
        if e.situation.task == "narrow" or already_right(e):
            speaks_for = "supervised" if not already_right(e) else "no pairs"
    if e.text is not None:
        low, high = e.text.bits_per_byte_interval
        said.append(f"text: {e.text.bits_per_byte:.3f} bits per byte [{low:.3f}, {high:.3f}] before training")
        if e.surprise is None:
            risks.append("without --general nobody knows whether the text is new to the model; it is taken to be")
        else:
            said.append(f"{e.surprise:.2f} times that of general text (another domain from {KNOWN_TEXT_RATIO})")
            if not text_is_news(e):
                speaks_for = "supervised"
    if e.situation.task == "narrow":
        risks.append("narrow scope: what the pairs do not ask may be forgotten")
    return Factor("task specificity", "; ".join(said), speaks_for, "; ".join(risks) or "none seen")


def _resources(e: Evidence) -> Factor:
    if not e.device_hours:
        return Factor(
            "resources", "no machines were stated (--hosts)", "open", "the cost is not known; dsft estimate tells it"
        )
    said = ", ".join(f"{method} {hours:.2f}" for method, hours in e.device_hours.items())
    budget = e.situation.max_device_hours
    within = [method for method, hours in e.device_hours.items() if budget is None or hours <= budget]
    limit = "no budget was stated" if budget is None else f"budget {budget:g}"
    risk = "computed from a stated share of the peak, not measured; the first steps of the run say what is true"
    return Factor("resources", f"device-hours: {said}; {limit}", ", ".join(within) or "nothing fits", risk)


def _control(e: Evidence) -> Factor:
    high = e.situation.control == "high"
    return Factor(
        "control against flexibility",
        f"control: {e.situation.control} (as stated)",
        "supervised, alone or last" if high else "open",
        "pairs fix the form: what they never show, the model never learns to do"
        if high
        else "after unsupervised training alone a model continues text and does not answer",
    )


def _ethics(e: Evidence) -> Factor:
    said, risks = [f"sensitivity of the text: {e.situation.sensitivity} (as stated)"], []
    if e.text is not None:
        repeated = e.text.duplicate_share + e.text.near_duplicate_share
        said.append(f"{repeated:.1%} of its rows are repeated, {e.text.broken_share:.1%} wrongly decoded")
        risks.append(
            "the bias of the corpus is learned with it, and nobody has read it; what is repeated is given out word for "
            "word (Carlini, Lee): memorisation is probed"
        )
    if e.pairs is not None:
        risks.append("the bias of whoever wrote the answers is learned from the pairs")
    speaks_for = "supervised, with pairs that people have read" if e.situation.sensitivity == "high" else "open"
    return Factor("ethics", "; ".join(said), speaks_for, "; ".join(risks) or "none seen")

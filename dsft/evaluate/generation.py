"""Scores of generated answers: exact match and token F1 always, ROUGE, BLEU, chrF and a user's checker where asked."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsft.config.evaluation import EvaluationSetSection
from dsft.evaluate.answers import Answers, check_references, choose_questions
from dsft.evaluate.bootstrap import interval
from dsft.evaluate.checker import check_path, verdicts
from dsft.evaluate.reference_metrics import ROUGE, corpus_score, require_packages, rouge
from dsft.evaluate.text_metrics import exact_match, shuffled_f1, token_f1

if TYPE_CHECKING:
    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag
    from dsft.store.reader import SourceStore

NUM_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer, for people to read."""

    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Scores of the answers; means over prompts, in [0, 1].

    Attributes:
        exact_match, f1: of each answer against its own reference.
        shuffled_f1: F1 of the same answers against other prompts' references, the control: an answer that only has
            the right style scores as much there.
        num_prompts: answers scored.
        scores: the section's ``metrics`` (BLEU and chrF of the whole set, in [0, 100]), and a checker's ``pass_rate``.
        intervals: 95 %, by bootstrap over prompts, of each score, exact_match and f1 included.
        outcomes: how often the checker said what; empty without one.
        samples: the first few, in store order.
    """

    exact_match: float
    f1: float
    shuffled_f1: float
    num_prompts: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    outcomes: dict[str, int]
    samples: tuple[Sample, ...]


def check_section(section: EvaluationSetSection, store: SourceStore, tokenizer: Tokenizer) -> None:
    """What can be known before anything is generated, so that no run ends at its first evaluation.

    Raises:
        ConfigError: a metric's package is not installed. DataError: there is no such checker, no prompt, or an empty
            reference.
    """
    if section.generate == 0:
        return
    require_packages(section.metrics)
    if section.checker is not None:
        check_path(Path(section.checker))
    check_references(choose_questions(store, section.generate), tokenizer, section.name)


def score_each(answers: Answers, section: EvaluationSetSection) -> dict[str, list[float]]:
    """Every score that an answer has by itself: name -> one value a prompt."""
    pairs = list(zip(answers.answers, answers.references, strict=True))
    each = {
        "exact_match": [exact_match(answer, reference) for answer, reference in pairs],
        "f1": [token_f1(answer, reference) for answer, reference in pairs],
    }
    kinds = [kind for kind in ROUGE if kind in section.metrics]
    if kinds:
        each.update(rouge(kinds, answers.answers, answers.references))
    return each


def check_each(
    answers: Answers, section: EvaluationSetSection, groups: Groups, stop: StopFlag | None = None
) -> list[str]:
    """The checker's outcome of each answer, on every rank; empty without a checker. Collective."""
    if section.checker is None:
        return []
    triples = list(zip(answers.prompts, answers.answers, answers.references, strict=True))
    return [
        verdict.outcome for verdict in verdicts(Path(section.checker), section.checker_seconds, triples, groups, stop)
    ]


def summarise_scores(
    answers: Answers, each: dict[str, list[float]], outcomes: list[str], section: EvaluationSetSection, *, seed: int
) -> GenerationResult:
    """Means, scores of the whole set, and intervals."""
    if outcomes:
        each = {**each, "pass_rate": [float(outcome == "passed") for outcome in outcomes]}
    means = {name: statistics.fmean(values) for name, values in each.items()}
    intervals = {
        name: interval(values, None, seed=seed, purpose=f"{section.name}/answers") for name, values in each.items()
    }
    for kind in section.metrics:
        if kind not in ROUGE:
            means[kind], intervals[kind] = corpus_score(kind, answers.answers, answers.references)
    return GenerationResult(
        exact_match=means.pop("exact_match"),
        f1=means.pop("f1"),
        shuffled_f1=shuffled_f1(answers.answers, answers.references, seed),
        num_prompts=len(answers.answers),
        scores=means,
        intervals=intervals,
        outcomes={outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        samples=tuple(
            Sample(prompt=prompt, answer=answer, reference=reference)
            for prompt, answer, reference in zip(
                answers.prompts[:NUM_SAMPLES], answers.answers, answers.references, strict=False
            )
        ),
    )

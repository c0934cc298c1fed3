"""One evaluation of all held-out sets: what the training loop calls when one is due."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from dsft.evaluate.answers import Answers, KeptAnswers, answer
from dsft.evaluate.generation import GenerationResult, check_each, score_each, summarise_scores
from dsft.evaluate.held_out import DocumentLosses, LossResult, measure_documents, summarise
from dsft.evaluate.memorisation import Memorisation, measure_memorisation
from dsft.evaluate.overfit import Overfitting, OverfitWatch

if TYPE_CHECKING:
    from dsft.batch.collate import BatchSpec
    from dsft.config.evaluation import EvaluationSetSection
    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag
    from dsft.model.packed import PackedCausalLM
    from dsft.store.reader import SourceStore


@dataclass(frozen=True, slots=True)
class HeldOutSet:
    """A held-out set as its section says, its token store, and the layout of a batch of it."""

    section: EvaluationSetSection
    store: SourceStore
    spec: BatchSpec


@dataclass(frozen=True, slots=True)
class SetResult:
    """Everything measured of one set, equal on all ranks.

    Attributes:
        documents: of each document. loss: of the set.
        answers, each, outcomes: the answers, their scores by name, and the checker's word on each.
        generation: scores of all answers. These four are None, or empty, where nothing is generated.
        memorisation: None where it is not probed.
    """

    documents: DocumentLosses
    loss: LossResult
    answers: Answers | None
    each: dict[str, list[float]]
    outcomes: list[str]
    generation: GenerationResult | None
    memorisation: Memorisation | None
    seconds: float

    def record(self) -> dict[str, Any]:
        """The scores, without documents and answers."""
        scores = {} if self.generation is None else asdict(self.generation)
        scores.update({} if self.memorisation is None else asdict(self.memorisation))
        return {**asdict(self.loss), **scores, "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation found, equal on all ranks.

    Attributes:
        records: one JSON-able record a set, for ``Recorder.write("evaluation", record)``.
        overfitting: sets whose held-out loss has risen for ``patience`` evaluations; each has a message.
    """

    records: tuple[dict[str, Any], ...]
    overfitting: tuple[Overfitting, ...]


def evaluate_all(
    sets: Sequence[HeldOutSet],
    model: PackedCausalLM,
    tokenizer: Tokenizer,
    groups: Groups,
    watch: OverfitWatch,
    *,
    device: torch.device,
    step: int,
    tokens_trained: int,
    train_losses: Mapping[str, float],
    seed: int,
    stop: StopFlag | None = None,
) -> Evaluation:
    """Measure every set, with the model as it is, on every rank (collective).

    Args:
        watch: takes each set's losses; its new state belongs into the next checkpoint.
        train_losses: recent training loss per source name, shown beside the held-out loss of the sets linked to it.
            Must be equal on all ranks, because early stopping is decided from it.
        stop: ends the evaluation between two batches.

    Raises:
        StoppedEarly: a rank was asked to stop; nothing of the evaluation is kept.
    """
    records: list[dict[str, Any]] = []
    overfitting: list[Overfitting] = []
    for held_out in sets:
        section = held_out.section
        result = evaluate_set(held_out, model, tokenizer, groups, device=device, seed=seed, stop=stop)
        train_loss = train_losses.get(section.source) if section.source is not None else None
        records.append(
            {
                "step": step,
                "tokens_trained": tokens_trained,
                "set": section.name,
                "train_loss": train_loss,
                **result.record(),
            }
        )
        found = watch.observe(section.name, step, result.loss.loss, train_loss)
        if found is not None:
            overfitting.append(found)
    return Evaluation(tuple(records), tuple(overfitting))


def evaluate_set(
    held_out: HeldOutSet,
    model: PackedCausalLM,
    tokenizer: Tokenizer,
    groups: Groups,
    *,
    device: torch.device,
    seed: int,
    kept: KeptAnswers | None = None,
    stop: StopFlag | None = None,
) -> SetResult:
    """Measure one set on every rank (collective).

    Args:
        kept: answers of an evaluation that was interrupted; new ones are added to it.
        stop: as for :func:`evaluate_all`.
    """
    started = time.perf_counter()
    section = held_out.section
    documents = measure_documents(
        model, held_out.store, held_out.spec, groups, device=device, max_documents=section.max_documents, stop=stop
    )
    loss = summarise(documents, seed=seed, purpose=section.name)
    memorisation = None
    if section.memorisation is not None:
        memorisation = measure_memorisation(model, held_out.store, tokenizer, groups, section, seed=seed, stop=stop)
    if section.generate == 0:
        return SetResult(documents, loss, None, {}, [], None, memorisation, time.perf_counter() - started)
    answers = answer(model, held_out.store, tokenizer, groups, section, seed=seed, kept=kept, stop=stop)
    with groups.together():
        each = score_each(answers, section)
    outcomes = check_each(answers, section, groups, stop)
    generation = summarise_scores(answers, each, outcomes, section, seed=seed)
    return SetResult(documents, loss, answers, each, outcomes, generation, memorisation, time.perf_counter() - started)

"""One evaluation of all held-out sets: what the training loop calls when one is due."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from dsft.evaluate.generation import evaluate_generation
from dsft.evaluate.held_out import evaluate_loss
from dsft.evaluate.overfit import Overfitting, OverfitWatch

if TYPE_CHECKING:
    from dsft.batch.collate import BatchSpec
    from dsft.config.models import EvaluationSetSection
    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.model.packed import PackedCausalLM
    from dsft.store.reader import SourceStore


@dataclass(frozen=True, slots=True)
class HeldOutSet:
    """A held-out set as its section says, its token store, and the layout of a batch of it."""

    section: EvaluationSetSection
    store: SourceStore
    spec: BatchSpec


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
) -> Evaluation:
    """Measure every set, with the model as it is, on every rank (collective).

    Args:
        watch: takes each set's losses; its new state belongs into the next checkpoint.
        train_losses: recent training loss per source name, shown beside the held-out loss of the sets linked to it.
            Must be equal on all ranks, because early stopping is decided from it.
    """
    records: list[dict[str, Any]] = []
    overfitting: list[Overfitting] = []
    for held_out in sets:
        section = held_out.section
        started = time.perf_counter()
        loss = evaluate_loss(
            model, held_out.store, held_out.spec, groups, device=device, max_documents=section.max_documents
        )
        train_loss = train_losses.get(section.source) if section.source is not None else None
        record = {
            "step": step,
            "tokens_trained": tokens_trained,
            "set": section.name,
            "train_loss": train_loss,
            **asdict(loss),
        }
        if section.generate > 0:
            answers = evaluate_generation(
                model,
                held_out.store,
                tokenizer,
                groups,
                num_prompts=section.generate,
                max_new_tokens=section.max_new_tokens,
                seed=seed,
            )
            record.update(asdict(answers))
        record["seconds"] = time.perf_counter() - started
        records.append(record)
        found = watch.observe(section.name, step, loss.loss, train_loss)
        if found is not None:
            overfitting.append(found)
    return Evaluation(tuple(records), tuple(overfitting))

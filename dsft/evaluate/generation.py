"""Exact match and token F1 of greedy answers to held-out prompts.

Prompts and references come from the token store, so they are exactly what training saw: the prompt is all that stands
before a document's last supervised span, the reference is that span.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsft.errors import DataError
from dsft.evaluate.mode import evaluating
from dsft.evaluate.text_metrics import exact_match, shuffled_f1, token_f1
from dsft.model.generate import greedy
from dsft.store.reader import SourceStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.model.packed import PackedCausalLM

PROMPTS_PER_CALL = 8
NUM_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what a held-out document answers to it; token ids, both non-empty.

    ``reference`` still has the end-of-turn token, if the span has it.
    """

    prompt: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer, for people to read."""

    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Scores of the answers, equal on all ranks; means over prompts, in [0, 1].

    Attributes:
        exact_match, f1: of each answer against its own reference.
        shuffled_f1: F1 of the same answers against other prompts' references, the control: an answer that only has
            the right style scores as much there.
        num_prompts: answers scored.
        samples: the first few, in store order.
    """

    exact_match: float
    f1: float
    shuffled_f1: float
    num_prompts: int
    samples: tuple[Sample, ...]


def evaluate_generation(
    model: PackedCausalLM,
    store: SourceStore,
    tokenizer: Tokenizer,
    groups: Groups,
    *,
    num_prompts: int,
    max_new_tokens: int,
    seed: int,
) -> GenerationResult:
    """Answer ``num_prompts`` prompts greedily, each on one rank, and score the answers.

    Every rank calls it and makes the same number of calls of ``greedy`` (which under ZeRO-3 makes the same number of
    forwards everywhere), also with no prompt left.

    Raises:
        DataError: no document of the set has a supervised span after a prompt.
    """
    questions = choose_questions(store, num_prompts)
    stops = stop_ids(questions, tokenizer)
    rank, num_ranks = groups.world.rank, groups.world.size
    by_length = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt))
    answers: list[tuple[int, list[int]]] = []
    with evaluating(model):
        for first in range(0, len(by_length), num_ranks * PROMPTS_PER_CALL):
            mine = by_length[first : first + num_ranks * PROMPTS_PER_CALL][rank::num_ranks]
            generated = greedy(
                model,
                [questions[number].prompt for number in mine],
                max_new_tokens=max_new_tokens,
                eos_ids=stops,
                pad_id=tokenizer.pad_id,
                synced=num_ranks > 1,
            )
            answers.extend(zip(mine, generated, strict=True))
    in_store_order = sorted((number, ids) for part in groups.all_gather_object(answers) for number, ids in part)
    return _score(questions, [ids for _, ids in in_store_order], tokenizer, stops, seed)


def choose_questions(store: SourceStore, num_prompts: int) -> list[Question]:
    """At most ``num_prompts`` questions, spread evenly over the documents that have one."""
    candidates: list[tuple[int, int]] = []
    for shard in range(store.num_shards):
        index = store.index(shard)
        has_span = np.flatnonzero(np.diff(index.span_offsets) > 0)
        last_start = index.spans[index.span_offsets[has_span + 1] - 1, 0]
        candidates.extend((shard, int(document)) for document in has_span[last_start > 0])
    if not candidates:
        raise DataError(
            f"held-out set {store.name!r} has nothing to answer: no document has a supervised span after a prompt. "
            "Generation needs an instruction format (messages or prompt_completion)."
        )
    num_chosen = min(num_prompts, len(candidates))
    return [_question(store, *candidates[i * len(candidates) // num_chosen]) for i in range(num_chosen)]


def _question(store: SourceStore, shard: int, document: int) -> Question:
    index = store.index(shard)
    start, end = index.spans[index.span_offsets[document + 1] - 1].tolist()
    first = int(index.token_offsets[document])
    tokens = store.tokens(shard)
    return Question(
        prompt=tuple(tokens[first : first + start].tolist()),
        reference=tuple(tokens[first + start : first + end].tolist()),
    )


def stop_ids(questions: Sequence[Question], tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the end of text, and the control tokens that end the references (end of turn)."""
    end_of_turn = {question.reference[-1] for question in questions} & tokenizer.control.ids
    return sorted({tokenizer.eos_id} | end_of_turn)


def _score(
    questions: Sequence[Question],
    answers: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    stops: Sequence[int],
    seed: int,
) -> GenerationResult:
    texts = [_text(ids, tokenizer, stops) for ids in answers]
    references = [_text(question.reference, tokenizer, stops) for question in questions]
    samples = [
        Sample(prompt=tokenizer.decode(question.prompt), answer=answer, reference=reference)
        for question, answer, reference in zip(questions[:NUM_SAMPLES], texts, references, strict=False)
    ]
    pairs = list(zip(texts, references, strict=True))
    return GenerationResult(
        exact_match=statistics.fmean(exact_match(answer, reference) for answer, reference in pairs),
        f1=statistics.fmean(token_f1(answer, reference) for answer, reference in pairs),
        shuffled_f1=shuffled_f1(texts, references, seed),
        num_prompts=len(pairs),
        samples=tuple(samples),
    )


def _text(ids: Sequence[int], tokenizer: Tokenizer, stops: Sequence[int]) -> str:
    """Text before the first stop token, without control tokens."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode([token for token in ids[:end] if token not in tokenizer.control.ids]).strip()

"""Answers to held-out prompts, greedy or sampled, dealt over the ranks; what was answered before is not asked again.

Prompts and references come from the token store, so they are exactly what training saw: the prompt is all that stands
before a document's last supervised span, the reference is that span.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsft.config.evaluation import EvaluationSetSection
from dsft.errors import DataError
from dsft.evaluate.mode import evaluating
from dsft.evaluate.stopping import end_if_asked
from dsft.fsio import save_error
from dsft.model.generate import Sampling, generate
from dsft.store.reader import SourceStore

if TYPE_CHECKING:
    from dsft.corpus.tokenizer import Tokenizer
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag
    from dsft.model.packed import PackedCausalLM

PROMPTS_PER_CALL = 8


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what a held-out document answers to it; token ids, both non-empty.

    ``reference`` still has the end-of-turn token, if the span has it.
    """

    prompt: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """Texts, in the store's order, equal on all ranks."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...]


class KeptAnswers:
    """Answers of an interrupted evaluation: one JSON line each, appended and fsynced as they are made (rank 0)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[int, list[int]]:
        """Question number -> token ids. A last line that was cut off is not there."""
        if not self._path.is_file():
            return {}
        lines = self._path.read_bytes().split(b"\n")[:-1]
        return {record["question"]: record["ids"] for record in map(json.loads, lines)}

    def append(self, answers: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Add answers after the last whole line. Raises SaveError."""
        lines = "".join(json.dumps({"question": number, "ids": list(ids)}) + "\n" for number, ids in answers)
        try:
            with open(self._path, "ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise save_error(self._path, error) from error


def answer(
    model: PackedCausalLM,
    store: SourceStore,
    tokenizer: Tokenizer,
    groups: Groups,
    section: EvaluationSetSection,
    *,
    seed: int,
    kept: KeptAnswers | None = None,
    stop: StopFlag | None = None,
) -> Answers:
    """Answer ``section.generate`` prompts; collective.

    Raises:
        DataError: no document has a supervised span after a prompt, or a prompt leaves no room for an answer.
        StoppedEarly: a rank was asked to stop.
    """
    questions = choose_questions(store, section.generate)
    _check_room(questions, store, model, section.max_new_tokens)
    stops = stop_ids(questions, tokenizer)
    ids = ask(
        model,
        [question.prompt for question in questions],
        groups,
        max_new_tokens=section.max_new_tokens,
        eos_ids=stops,
        pad_id=tokenizer.pad_id,
        sampling=_sampling(section, len(questions), seed),
        kept=kept,
        stop=stop,
    )
    return Answers(
        prompts=tuple(tokenizer.decode(question.prompt) for question in questions),
        answers=tuple(_text(one, tokenizer, stops) for one in ids),
        references=tuple(_text(question.reference, tokenizer, stops) for question in questions),
    )


def ask(
    model: PackedCausalLM,
    prompts: Sequence[Sequence[int]],
    groups: Groups,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
    kept: KeptAnswers | None = None,
    stop: StopFlag | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, on every rank; each prompt is continued on one of them.

    Every rank makes the same number of calls of ``generate``, also with no prompt left. Raises StoppedEarly between two
    of them when a rank was asked to stop.

    Args:
        sampling: with one seed a prompt; None: greedy.
    """
    rank, num_ranks = groups.world.rank, groups.world.size
    done: dict[int, list[int]] = {}
    if kept is not None:
        with groups.together():
            before = kept.read() if rank == 0 else {}
        done = dict(groups.broadcast_object([*before.items()]))
    waiting = [number for number in range(len(prompts)) if number not in done]
    waiting.sort(key=lambda number: len(prompts[number]))
    with evaluating(model):
        for first in range(0, len(waiting), num_ranks * PROMPTS_PER_CALL):
            end_if_asked(stop, groups)
            mine = waiting[first : first + num_ranks * PROMPTS_PER_CALL][rank::num_ranks]
            generated = generate(
                model,
                [prompts[number] for number in mine],
                max_new_tokens=max_new_tokens,
                eos_ids=eos_ids,
                pad_id=pad_id,
                synced=num_ranks > 1,
                sampling=None if sampling is None else sampling.only(mine),
            )
            parts = groups.all_gather_object(list(zip(mine, generated, strict=True)))
            new = [(number, ids) for part in parts for number, ids in part]
            done.update(new)
            if kept is not None:
                with groups.together():
                    if rank == 0:
                        kept.append(new)
    return [done[number] for number in range(len(prompts))]


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
    return [_question(store, *candidate) for candidate in spread(candidates, num_prompts)]


def spread(candidates: Sequence[tuple[int, int]], num_wanted: int) -> list[tuple[int, int]]:
    """At most ``num_wanted`` of the candidates, evenly from first to last."""
    num_chosen = min(num_wanted, len(candidates))
    return [candidates[i * len(candidates) // num_chosen] for i in range(num_chosen)]


def check_references(questions: Sequence[Question], tokenizer: Tokenizer, set_name: str) -> None:
    """Raise DataError where there is nothing to score an answer against."""
    stops = stop_ids(questions, tokenizer)
    empty = [question for question in questions if not _text(question.reference, tokenizer, stops)]
    if empty:
        prompt = tokenizer.decode(empty[0].prompt)[-80:]
        raise DataError(
            f"held-out set {set_name!r}: {len(empty)} of {len(questions)} references are empty (first: the answer to "
            f"{prompt!r}), so there is nothing to score an answer against. Take those records out of the set."
        )


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


def _check_room(questions: Sequence[Question], store: SourceStore, model: PackedCausalLM, max_new_tokens: int) -> None:
    """A prompt that fills the model's context would be answered from positions that it has never seen."""
    positions = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(question.prompt) for question in questions)
    if positions is not None and longest + max_new_tokens > positions:
        raise DataError(
            f"held-out set {store.name!r}: its longest prompt has {longest:,} tokens, and with max_new_tokens "
            f"{max_new_tokens:,} that is more than the model's context of {positions:,}. Lower max_new_tokens, or take "
            "that record out of the set."
        )


def _sampling(section: EvaluationSetSection, num_prompts: int, seed: int) -> Sampling | None:
    if section.temperature == 0.0:
        return None
    seeds = tuple(seed_of(seed, section.name, number) for number in range(num_prompts))
    return Sampling(section.temperature, section.top_p, seeds)


def seed_of(seed: int, set_name: str, number: int) -> int:
    """Seed of one prompt's draws, from the run's seed, the set and the prompt's number."""
    digest = hashlib.blake2b(f"{seed}/answer/{set_name}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _text(ids: Sequence[int], tokenizer: Tokenizer, stops: Sequence[int]) -> str:
    """Text before the first stop token, without control tokens."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode([token for token in ids[:end] if token not in tokenizer.control.ids]).strip()

"""Answers held-out questions with the exported model, in plain transformers, and scores them."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.evaluate.text_metrics import exact_match, token_f1

NUM_SHUFFLES = 20
_MAX_NEW_TOKENS = 64
_PROMPTS_A_BATCH = 32


@dataclass(frozen=True, slots=True)
class Answered:
    """A held-out question, its kind, what the model answered and what the library says."""

    kind: str
    question: str
    answer: str
    reference: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over questions, in [0, 1].

    Attributes:
        f1, exact_match: of the answers against their own references.
        f1_by_kind: the same F1 for each kind of question.
        shuffled_f1_mean, shuffled_f1_max: of the same answers against the references of other questions, over
            ``NUM_SHUFFLES`` shuffles.
        same_kind_f1_mean, same_kind_f1_max: shuffled among questions of the same kind only, a harder control: an answer
            that merely has the right form scores as well there.
    """

    num_questions: int
    f1: float
    exact_match: float
    f1_by_kind: dict[str, float]
    shuffled_f1_mean: float
    shuffled_f1_max: float
    same_kind_f1_mean: float
    same_kind_f1_max: float


def answer_questions(model_folder: Path, records: Sequence[dict[str, Any]]) -> list[Answered]:
    """Greedy answers to the records' first messages, from a Hugging Face folder with a chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    end_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    answered: list[Answered] = []
    for first in range(0, len(records), _PROMPTS_A_BATCH):
        part = records[first : first + _PROMPTS_A_BATCH]
        prompts = tokenizer.apply_chat_template(
            [record["messages"][:1] for record in part],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=_MAX_NEW_TOKENS,
                eos_token_id=end_ids,
                pad_token_id=tokenizer.pad_token_id,
            )
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        answered.extend(_answered(record, answer) for record, answer in zip(part, answers, strict=True))
    return answered


def score(answered: Sequence[Answered], seed: int = 0) -> Scores:
    """F1 of the answers against their own references and, shuffled, against others'."""
    kinds = sorted({item.kind for item in answered})
    own = [_f1(item.answer, item.reference) for item in answered]
    anyone = [[number for number, _ in enumerate(answered)]]
    same_kind = [[number for number, item in enumerate(answered) if item.kind == kind] for kind in kinds]
    shuffled = [_shuffled_f1(answered, anyone, seed + number) for number in range(NUM_SHUFFLES)]
    shuffled_in_kind = [_shuffled_f1(answered, same_kind, seed + number) for number in range(NUM_SHUFFLES)]
    return Scores(
        num_questions=len(answered),
        f1=statistics.fmean(own),
        exact_match=statistics.fmean(exact_match(item.answer, item.reference) for item in answered),
        f1_by_kind={
            kind: statistics.fmean(own[i] for i in group) for kind, group in zip(kinds, same_kind, strict=True)
        },
        shuffled_f1_mean=statistics.fmean(shuffled),
        shuffled_f1_max=max(shuffled),
        same_kind_f1_mean=statistics.fmean(shuffled_in_kind),
        same_kind_f1_max=max(shuffled_in_kind),
    )


def _f1(answer: str, reference: str) -> float:
    """Token F1 over identifiers and words; without the split, ``a.b(c`` would be one word."""
    return token_f1(" ".join(re.findall(r"\w+", answer)), " ".join(re.findall(r"\w+", reference)))


def _shuffled_f1(answered: Sequence[Answered], groups: Sequence[Sequence[int]], seed: int) -> float:
    """Mean F1 when, inside each group, every answer meets the reference of another question."""
    generator = random.Random(seed)
    total = 0.0
    for group in groups:
        order = generator.sample(group, len(group))
        pairs = zip(order, order[1:] + order[:1], strict=True)  # a rotation: nobody keeps the own one
        total += sum(_f1(answered[mine].answer, answered[other].reference) for mine, other in pairs)
    return total / len(answered)


def _answered(record: dict[str, Any], answer: str) -> Answered:
    question, reference = (message["content"] for message in record["messages"])
    return Answered(record["kind"], question, answer.strip(), reference)

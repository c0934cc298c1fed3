"""Batched greedy generation against plain transformers, one prompt at a time."""

from __future__ import annotations

import pytest
import torch

from dsft.model.generate import generate
from dsft.model.packed import PackedCausalLM
from tests.support.models import copy_of, random_row, tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


def by_hand(hf: object, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "granite", "cohere", "phi", "mixtral"])
def test_equals_plain_transformers(name: str) -> None:
    plain = tiny_model(name)
    model = PackedCausalLM(copy_of(plain)).train()
    model.hf.generation_config.repetition_penalty = 3.0  # a model's own settings must not reach a greedy answer
    model.hf.generation_config.do_sample = True
    answers = generate(model, PROMPTS, max_new_tokens=9, eos_ids=[], pad_id=0, synced=False)
    assert answers == [by_hand(plain, prompt, 9) for prompt in PROMPTS]
    assert model.training
    assert model.hf.generation_config.repetition_penalty == 3.0
    model(**random_row().inputs()).loss.backward()  # packed attention is back


def test_an_answer_ends_before_the_end_token() -> None:
    plain = tiny_model("llama")
    model = PackedCausalLM(copy_of(plain))
    full = by_hand(plain, PROMPTS[0], 9)
    end = full[4]
    (answer,) = generate(model, PROMPTS[:1], max_new_tokens=9, eos_ids=[end, 96], pad_id=0, synced=False)
    assert answer == full[: full.index(end)]
    assert generate(model, [], max_new_tokens=9, eos_ids=[], pad_id=0, synced=False) == []

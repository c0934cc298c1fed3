"""Greedy answers to held-out prompts: what is asked, what ends an answer, the same scores on any number of ranks."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsft.batch.collate import BatchSpec
from dsft.config.evaluation import EvaluationSetSection
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.errors import DataError
from dsft.evaluate.answers import KeptAnswers, answer, choose_questions, stop_ids
from dsft.evaluate.generation import GenerationResult, check_section, score_each, summarise_scores
from dsft.evaluate.overfit import OverfitWatch
from dsft.evaluate.run import Evaluation, HeldOutSet, evaluate_all
from dsft.model.packed import PackedCausalLM
from dsft.store.reader import SourceStore
from dsft.store.types import Document
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.tokenizers import VOCAB_TOKENS, tiny_tokenizer_folder

PAIRS = [
    ("What does open do?", "Open a file."),
    ("What does close do?", "Close the file object."),
    ("What is a list?", "A mutable sequence type"),
    ("What is a dict?", "A mapping object"),
    ("And len?", "Return the length"),
]


class _Alone:
    """What ``Groups`` is for one process, without a process group."""

    world = SimpleNamespace(rank=0, size=1)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        return value

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a store of conversations, and a model that has learned all but the last of them by heart."""
    folder = tmp_path_factory.mktemp("generation")
    tiny_tokenizer_folder(folder)
    tokenizer = _tokenizer(folder)
    documents = [_conversation(tokenizer, *pair) for pair in PAIRS]
    documents.insert(2, text_document([5, 6, 7]))  # nothing before its span: no question
    documents.insert(4, Document(np.array([5, 6], np.int32), np.zeros((0, 2), np.int32), np.zeros(0, np.float32), 0))
    write_store(folder / "store", documents, num_shards=2, name="heldout-qa")
    torch.manual_seed(0)
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    learned = [torch.from_numpy(_conversation(tokenizer, *pair).ids.astype(np.int64))[None] for pair in PAIRS[:-1]]
    for _ in range(40):
        loss = sum((model(ids, labels=ids).loss for ids in learned), start=torch.zeros(()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    return folder


def _model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_TOKENS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder / "tokenizer"), chat_template="chatml")


def _conversation(tokenizer: Tokenizer, question: str, answer: str) -> Document:
    """Question, answer, end of turn; then an unsupervised newline, as chatml has it."""
    end_of_turn = tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    prompt, reply, newline = (ids.tolist() for ids in tokenizer.encode_batch([question, answer, "\n"]))
    ids = np.array([1, *prompt, *reply, end_of_turn, *newline], np.int32)
    start, end = 1 + len(prompt), 1 + len(prompt) + len(reply) + 1
    spans = np.array([[1, 2], [start, end]], np.int32)  # an earlier supervised span is part of the prompt
    return Document(ids, spans, np.ones(2, np.float32), num_bytes=len(answer))


def _evaluate(groups: Any, folder: Path) -> dict[str, Any]:
    model = PackedCausalLM(LlamaForCausalLM.from_pretrained(folder / "model"))
    section = EvaluationSetSection(name="qa", path="x", format="messages", generate=10, max_new_tokens=16)
    answers = answer(model, SourceStore(folder / "store"), _tokenizer(folder), groups, section, seed=1)
    result = summarise_scores(answers, score_each(answers, section), [], section, seed=1)
    return {name: getattr(result, name) for name in GenerationResult.__slots__}


def test_learned_answers_are_matched_and_scored_above_shuffled_ones(folder: Path) -> None:
    result = _evaluate(_Alone(), folder)
    assert result["num_prompts"] == len(PAIRS)
    assert result["exact_match"] == pytest.approx(0.8)
    assert 0.8 <= result["f1"] < 1.0
    assert result["shuffled_f1"] < 0.5
    sample = result["samples"][0]
    assert (sample.answer, sample.reference) == (PAIRS[0][1], PAIRS[0][1])
    assert sample.prompt.endswith(PAIRS[0][0])


def test_answers_equal_plain_generate(folder: Path) -> None:
    tokenizer, model = _tokenizer(folder), LlamaForCausalLM.from_pretrained(folder / "model")
    questions = choose_questions(SourceStore(folder / "store"), 10)
    answers = []
    for question in questions:
        prompt = torch.tensor([question.prompt])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=stop_ids(questions, tokenizer),
            pad_token_id=tokenizer.pad_id,
        )
        answers.append(tokenizer.hf.decode(output[0, len(question.prompt) :], skip_special_tokens=True).strip())
    assert [sample.answer for sample in _evaluate(_Alone(), folder)["samples"]] == answers[:3]


def test_does_not_depend_on_the_world_size(folder: Path) -> None:
    alone = _evaluate(_Alone(), folder)
    for result in run_ranks(_evaluate, 3, folder, timeout_seconds=120):
        assert result == alone


def _sampled(groups: Any, folder: Path, kept: Path | None = None) -> list[str]:
    """Answers sampled hot enough that greedy choice would give others."""
    model = PackedCausalLM(LlamaForCausalLM.from_pretrained(folder / "model"))
    section = EvaluationSetSection(
        name="qa", path="x", format="messages", generate=10, max_new_tokens=16, temperature=2.0, top_p=0.95
    )
    store = SourceStore(folder / "store")
    answers = None if kept is None else KeptAnswers(kept)
    return list(answer(model, store, _tokenizer(folder), groups, section, seed=1, kept=answers).answers)


def test_sampled_answers_come_from_seed_and_position_alone(folder: Path) -> None:
    alone = _sampled(_Alone(), folder)
    assert len(set(alone)) == len(PAIRS)
    assert alone != [pair[1] for pair in PAIRS]
    assert _sampled(_Alone(), folder) == alone
    assert run_ranks(_sampled, 2, folder, timeout_seconds=120) == [alone, alone]


def test_an_interrupted_evaluation_asks_only_what_has_no_answer_yet(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "answers.jsonl"
    whole = _sampled(_Alone(), folder, kept)
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(PAIRS)
    changed = {**json.loads(lines[0]), "ids": [5]}  # shows that it was taken, not asked again
    kept.write_bytes(json.dumps(changed).encode() + b"\n" + lines[1] + lines[2][:-4])  # killed in the third line
    again = _sampled(_Alone(), folder, kept)
    assert [before == after for before, after in zip(whole, again, strict=True)].count(False) == 1
    assert again[changed["question"]] == _tokenizer(folder).decode([5]).strip()
    assert [json.loads(line)["question"] for line in kept.read_bytes().splitlines()][:2] == [
        changed["question"],
        json.loads(lines[1])["question"],
    ]
    assert len(KeptAnswers(kept).read()) == len(PAIRS)


def test_what_cannot_be_scored_is_refused_before_anything_is_generated(folder: Path, tmp_path: Path) -> None:
    tokenizer = _tokenizer(folder)
    section = EvaluationSetSection(name="qa", path="x", format="messages", generate=10, max_new_tokens=16)
    check_section(section, SourceStore(folder / "store"), tokenizer)
    empty = _conversation(tokenizer, "And then?", "")
    store = write_store(tmp_path / "empty", [_conversation(tokenizer, *PAIRS[0]), empty], name="qa")
    with pytest.raises(DataError, match=r"'qa': 1 of 2 references are empty.*And then\?"):
        check_section(section, store, tokenizer)
    with pytest.raises(DataError, match=r"checker none\.py is not there"):
        check_section(section.model_copy(update={"checker": "none.py"}), SourceStore(folder / "store"), tokenizer)
    model = PackedCausalLM(LlamaForCausalLM.from_pretrained(folder / "model"))
    long = section.model_copy(update={"max_new_tokens": 2048})
    with pytest.raises(DataError, match="more than the model's context of 2,048"):
        answer(model, SourceStore(folder / "store"), tokenizer, _Alone(), long, seed=1)  # type: ignore[arg-type]


def test_questions_are_what_stands_before_the_last_span(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    questions = choose_questions(SourceStore(folder / "store"), 10)
    assert [tokenizer.decode(question.prompt).removeprefix("<s>").strip() for question in questions] == [
        question for question, _ in PAIRS
    ]
    assert [tokenizer.decode(question.reference) for question in questions] == [f"{a}<|im_end|>" for _, a in PAIRS]
    assert len(choose_questions(SourceStore(folder / "store"), 2)) == 2
    end_of_turn = tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(questions, tokenizer) == sorted([tokenizer.eos_id, end_of_turn])


def test_a_set_without_questions_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prose"):
        choose_questions(write_store(tmp_path, [text_document([1, 2, 3])], name="prose"), 5)


def test_evaluate_all_writes_one_record_a_set_and_feeds_the_watch(folder: Path) -> None:
    model = PackedCausalLM(LlamaForCausalLM.from_pretrained(folder / "model"))
    store, tokenizer = SourceStore(folder / "store"), _tokenizer(folder)
    spec = BatchSpec((store,), (1.0,), "token", pack_tokens=64, pad_id=tokenizer.pad_id)
    linked = EvaluationSetSection(name="qa", path="x", format="messages", source="pairs", generate=3, max_new_tokens=8)
    free = EvaluationSetSection(name="free", path="x", max_documents=2)
    watch = OverfitWatch(patience=1)

    def evaluate(step: int, train_loss: float) -> Evaluation:
        return evaluate_all(
            [HeldOutSet(linked, store, spec), HeldOutSet(free, store, spec)],
            model,
            tokenizer,
            _Alone(),  # type: ignore[arg-type]
            watch,
            device=torch.device("cpu"),
            step=step,
            tokens_trained=100 * step,
            train_losses={"pairs": train_loss},
            seed=1,
        )

    first = evaluate(10, 2.0)
    with_answers, without = first.records
    assert (with_answers["set"], with_answers["step"], with_answers["tokens_trained"]) == ("qa", 10, 1000)
    assert with_answers["train_loss"] == 2.0
    assert with_answers["num_prompts"] == 3
    assert with_answers["samples"][0]["answer"] == PAIRS[0][1]
    assert without["train_loss"] is None
    assert "f1" not in without
    assert without["num_documents"] == 2
    assert json.loads(json.dumps(first.records[0])) is not None
    assert first.overfitting == ()

    with torch.no_grad():
        model.hf.get_output_embeddings().weight.mul_(3.0)  # over-confident: worse on the set, whatever training says
    second = evaluate(20, 1.0)
    assert second.records[0]["loss"] > first.records[0]["loss"]
    assert [found.set_name for found in second.overfitting] == ["qa"]
    assert watch.to_json()["free"]["num_rises"] == 0

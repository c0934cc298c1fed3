"""Held-out loss: against plain transformers per document in fp64, at several world sizes, and without a trace."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsft.batch.collate import BatchSpec
from dsft.errors import DataError, StoppedEarly
from dsft.evaluate import held_out
from dsft.evaluate.held_out import LossResult, choose_documents, measure_documents, summarise
from dsft.launch.stop import StopFlag
from dsft.model.packed import PackedCausalLM
from dsft.store.reader import SourceStore
from dsft.store.types import Document
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store

VOCAB_TOKENS, PACK_TOKENS = 101, 24


class _Alone:
    """What ``Groups`` is for one process, without a process group."""

    world = SimpleNamespace(rank=0, size=1)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values

    def post(self, vector: np.ndarray) -> Any:
        return SimpleNamespace(wait=lambda: vector[None])


def _plain_model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def _documents() -> list[Document]:
    """Raw text (some longer than a pack, one of a single token) and documents of which only parts are supervised."""
    generator = np.random.default_rng(3)
    documents = [text_document(generator.integers(0, VOCAB_TOKENS, n).tolist()) for n in (5, 1, 24, 60, 2, 17, 25, 9)]
    for n, spans in ((20, [[3, 7], [12, 20]]), (30, [[26, 30]]), (8, [])):
        ids = generator.integers(0, VOCAB_TOKENS, n).astype(np.int32)
        columns = np.array(spans, np.int32).reshape(-1, 2)
        documents.append(Document(ids, columns, np.full(len(spans), 0.5, np.float32), num_bytes=3 * len(spans)))
    return documents


def _spec(store: SourceStore) -> BatchSpec:
    return BatchSpec(
        stores=(store,), loss_weights=(1.0,), loss_reduction="token", pack_tokens=PACK_TOKENS, pad_id=VOCAB_TOKENS - 1
    )


def test_a_stop_ends_it_between_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of a run: tests/train/test_evaluation.py."""
    store = write_store(tmp_path, _documents(), name="held-out", vocab_tokens=VOCAB_TOKENS)
    stop, num_batches, collate = StopFlag(), 0, held_out.collate

    def counting(packs: Any, spec: BatchSpec) -> Any:
        nonlocal num_batches
        num_batches += 1
        if num_batches == 2:
            stop.request("SIGUSR1")
        return collate(packs, spec)

    monkeypatch.setattr(held_out, "collate", counting)
    model, cpu = PackedCausalLM(_plain_model()).train(), torch.device("cpu")
    groups: Any = _Alone()
    with pytest.raises(StoppedEarly):
        measure_documents(model, store, _spec(store), groups, device=cpu, stop=stop)
    assert num_batches == 2
    assert model.training


def _evaluate(store: SourceStore, groups: Any, max_documents: int | None = None) -> LossResult:
    model = PackedCausalLM(_plain_model())
    cpu = torch.device("cpu")
    documents = measure_documents(model, store, _spec(store), groups, device=cpu, max_documents=max_documents)
    return summarise(documents, seed=1, purpose="held-out")


def _reference(documents: list[Document]) -> tuple[float, int, int]:
    """Summed nll, number of supervised tokens, and first choices among them, in fp64: each piece
    of a document alone, in plain transformers."""
    model = _plain_model().double().eval()
    total, count, correct = 0.0, 0, 0
    for document in documents:
        ids = torch.from_numpy(document.ids.astype(np.int64))
        supervised = {t for start, end in document.spans.tolist() for t in range(max(start, 1), end)}
        for start in range(0, len(ids), PACK_TOKENS):  # a piece does not see the pieces before it
            with torch.no_grad():
                log_probs = model(ids[None, start : start + PACK_TOKENS]).logits[0].log_softmax(-1)
            for row in range(len(log_probs)):
                target = start + row + 1
                if target in supervised:
                    total -= float(log_probs[row, ids[target]])
                    correct += int(log_probs[row].argmax()) == int(ids[target])
                    count += 1
    return total, count, correct


def test_equals_plain_transformers_per_document_in_fp64(tmp_path: Path) -> None:
    documents = _documents()
    result = _evaluate(write_store(tmp_path, documents, num_shards=3), _Alone())
    nll, num_tokens, num_correct = _reference(documents)
    assert num_correct > 0
    assert result.token_accuracy == num_correct / num_tokens
    assert result.loss_interval[0] < result.loss < result.loss_interval[1]
    num_bytes = sum(document.num_bytes for document in documents)
    assert result.num_tokens == num_tokens
    assert result.num_documents == len(documents)
    assert result.num_bytes == num_bytes
    assert result.loss == pytest.approx(nll / num_tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll / num_tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-6)


def _ranked(groups: Any, folder: Path) -> dict[str, Any]:
    result = _evaluate(SourceStore(folder), groups)
    return {name: getattr(result, name) for name in LossResult.__slots__}


def test_does_not_depend_on_the_world_size(tmp_path: Path) -> None:
    store = write_store(tmp_path, _documents(), num_shards=2)
    alone = _evaluate(store, _Alone())
    for num_ranks in (2, 3):
        results = run_ranks(_ranked, num_ranks, tmp_path, timeout_seconds=90)
        for result in results:
            assert result == results[0], "every rank has the same bits"
            assert result["num_tokens"] == alone.num_tokens
            assert result["loss"] == pytest.approx(alone.loss, rel=1e-12)


def _train(with_evaluation: bool, store: SourceStore) -> list[float]:
    """Losses of a plain training with dropout; evaluation in the middle must not move any of its bits."""
    model = PackedCausalLM(_plain_model(dropout=0.3))
    model.train()
    model.hf.model.norm.eval()  # a module that someone froze in evaluation mode stays so
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.arange(20)[None]
    losses = []
    torch.manual_seed(5)
    for _ in range(4):
        if with_evaluation:
            measure_documents(model, store, _spec(store), _Alone(), device=torch.device("cpu"))  # type: ignore[arg-type]
            assert model.training
            assert model.hf.model.layers[0].training
            assert not model.hf.model.norm.training
        output = model(
            batch,
            position_ids=batch,
            cu_seqlens=torch.tensor([0, 20], dtype=torch.int32),
            max_seqlen=20,
            rows=torch.arange(19),
            targets=batch[0, 1:],
            row_weight=torch.ones(19),
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses


def test_leaves_no_trace_in_training(tmp_path: Path) -> None:
    store = write_store(tmp_path, _documents())
    assert _train(True, store) == _train(False, store)


def test_max_documents_are_spread_over_the_store(tmp_path: Path) -> None:
    documents = [text_document([i % VOCAB_TOKENS] * 6) for i in range(10)]
    store = write_store(tmp_path, documents, num_shards=3)
    chosen = choose_documents(store, 5)
    starts = np.cumsum([0] + [len(store.index(shard).lengths) for shard in range(3)])
    assert [int(starts[shard] + d) for shard, numbers in enumerate(chosen) for d in numbers] == [0, 2, 4, 6, 8]
    assert [len(numbers) for numbers in choose_documents(store, None)] == np.diff(starts).tolist()
    assert sum(len(numbers) for numbers in choose_documents(store, 99)) == 10

    result = _evaluate(store, _Alone(), max_documents=5)
    nll, num_tokens, _ = _reference(documents[::2])
    assert result.num_documents == 5
    assert result.num_tokens == num_tokens
    assert result.loss == pytest.approx(nll / num_tokens, rel=1e-6)


def test_a_set_without_supervised_tokens_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document([4])] * 3, name="heldout-qa")
    with pytest.raises(DataError, match="heldout-qa"):
        _evaluate(store, _Alone())

"""The probe finds what a model was made to learn by heart, and nothing of what it never saw."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsft.config.evaluation import EvaluationSetSection, MemorisationSection
from dsft.errors import DataError
from dsft.evaluate.memorisation import Memorisation, choose_beginnings, measure_memorisation
from dsft.model.packed import PackedCausalLM
from tests.support.stores import text_document, write_store

VOCAB, PREFIX, CONTINUED = 89, 6, 8


class _Alone:
    world = SimpleNamespace(rank=0, size=1)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Ten documents to learn, then ten of the same kind that are not; and one too short to probe."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (20, 20)).tolist()
    return [*ids[:10], [5, 6, 7], *ids[10:]]


def trained(documents: list[list[int]], steps: int) -> PackedCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape))
    optimizer = torch.optim.AdamW(hf.parameters(), lr=3e-3)
    batch = torch.tensor(documents)
    for _ in range(steps):
        hf(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return PackedCausalLM(hf)


def probe(model: PackedCausalLM, folder: Path, documents: list[list[int]]) -> Memorisation:
    store = write_store(folder, [text_document(ids) for ids in documents], num_shards=2)
    section = EvaluationSetSection(
        name="x",
        path="x",
        memorisation=MemorisationSection(documents=50, prefix_tokens=PREFIX, continue_tokens=CONTINUED),
    )
    tokenizer: Any = SimpleNamespace(eos_id=2, pad_id=0)
    return measure_memorisation(model, store, tokenizer, _Alone(), section, seed=1)  # type: ignore[arg-type]


def test_a_model_that_learned_by_heart_is_found_and_a_clean_one_is_not(
    documents: list[list[int]], tmp_path: Path
) -> None:
    by_heart, clean = trained(documents[:10], 80), trained(documents[:10], 2)
    seen = probe(by_heart, tmp_path / "seen", documents[:11])
    assert (seen.memorised_share, seen.num_probed) == (1.0, 10)
    half = probe(by_heart, tmp_path / "half", documents)
    assert half.memorised_share == 0.5
    assert 0.2 < half.memorised_interval[0] < 0.5 < half.memorised_interval[1] < 0.8
    assert probe(by_heart, tmp_path / "unseen", documents[11:]).memorised_share == 0.0
    assert probe(clean, tmp_path / "clean", documents[:10]).memorised_share == 0.0


def test_documents_too_short_to_probe_are_left_out_or_refused(documents: list[list[int]], tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document(ids) for ids in documents], num_shards=3)
    beginnings = choose_beginnings(store, 4, 14)
    assert beginnings == [tuple(documents[number][:14]) for number in (0, 5, 11, 16)]
    with pytest.raises(DataError, match="no document has 21 tokens"):
        choose_beginnings(store, 4, 21)

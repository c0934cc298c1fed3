"""An encoder under ZeRO-3: the same losses on 1 and 2 ranks, and after a resume; the tied projection and bias train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from dsft.dist import Groups
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import Outcome, run_training

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

VOCAB_TOKENS, NUM_STEPS = 97, 8


def _config(model: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"pack_tokens": 32, "sources": [{"name": "text", "path": "-", "objective": {"kind": "mlm"}}]},
        "train": {"steps": NUM_STEPS, "global_batch_packs": 5, "lr": 5e-3},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}},
        "checkpoint": {"every_steps": 4},
    }


def _run(groups: Groups, folder: Path) -> tuple[Outcome, Outcome]:
    config = _config(folder / "model")
    whole = run_training(groups, folder / f"run-{groups.size}", config, [folder / "text"], False)
    checkpoint = folder / f"run-{groups.size}" / "checkpoints" / "step-00000004"
    return whole, run_training(
        groups, folder / f"resumed-{groups.size}", config, [folder / "text"], False, resume=str(checkpoint)
    )


def test_losses_do_not_depend_on_ranks_or_a_resume(tmp_path: Path) -> None:
    generator = np.random.default_rng(9)
    lengths = [*generator.integers(2, 33, 60).tolist(), 50, 70]
    ids = [[2, *(3 + generator.geometric(0.1, n) % (VOCAB_TOKENS - 3)).tolist(), 2] for n in lengths]
    write_store(tmp_path / "text", [text_document(one) for one in ids], name="text", vocab_tokens=VOCAB_TOKENS)
    torch.manual_seed(4)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertForMaskedLM(BertConfig(vocab_size=VOCAB_TOKENS, initializer_range=0.1, **shape, **dropout)).save_pretrained(
        tmp_path / "model"
    )
    (alone, resumed_alone), (two, resumed_two) = (
        run_ranks(_run, ranks, tmp_path, timeout_seconds=280)[0] for ranks in (1, 2)
    )
    assert alone.losses[-1] < alone.losses[0] - 0.1, "it learns"
    np.testing.assert_allclose(two.losses, alone.losses, rtol=1e-6)
    np.testing.assert_allclose(two.grad_norms, alone.grad_norms, rtol=1e-5)
    assert resumed_alone.losses == alone.losses[4:]
    assert resumed_alone.state_digest == alone.state_digest
    assert resumed_two.state_digest == two.state_digest
    assert [line["data_hash"] for line in alone.data] == [line["data_hash"] for line in two.data]

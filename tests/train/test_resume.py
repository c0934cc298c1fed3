"""Stopping after a step and going on is the same, bit by bit, as never having stopped.

Raw text, instructions, and both in stages; stopped at the first step, inside windows, at their ends and around a stage
border; every time in a fresh engine and a fresh run folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsft.dist import Groups
from dsft.metrics.recorder import METRICS_NAME
from dsft.store.types import Document
from dsft.train.step_log import DATA_LOG_NAME
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import Outcome, read_lines, run_training

pytestmark = [pytest.mark.launch]

VOCAB_TOKENS, PACK_TOKENS, TRAIN_TOKENS = 97, 32, 2200
STAGE_BORDER_TOKENS = 900
STOPS = {"text": (1, 6), "chat": (3,), "mixed": (1, 4, 5, 6, 7, 8, 11)}


def _config(kind: str, model: Path) -> dict[str, Any]:
    names = {"text": ["text"], "chat": ["chat"], "mixed": ["text", "chat"]}[kind]
    stages = [
        {"until_tokens": STAGE_BORDER_TOKENS, "weights": {"text": 0.8, "chat": 0.2}},
        {"until_tokens": TRAIN_TOKENS, "weights": {"text": 0.1, "chat": 0.9}},
    ]
    return {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {
            "pack_tokens": PACK_TOKENS,
            "sources": [{"name": name, "path": "-"} for name in names],
            "stages": stages if kind == "mixed" else [],
            "window_documents": 23,
        },
        "train": {"tokens": TRAIN_TOKENS, "global_batch_packs": 5, "lr": 2e-3, "schedule": {"warmup_tokens": 300}},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}},
        "checkpoint": {"every_steps": 1, "keep_last": 100},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCAB_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,  # random numbers must resume too
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    generator = np.random.default_rng(9)
    text, chat = [], []
    for length in generator.integers(2, 50, 40).tolist():
        text.append(text_document(generator.integers(3, VOCAB_TOKENS, length).tolist()))
        ids = generator.integers(3, VOCAB_TOKENS, length).astype(np.int32)
        span = np.array([[length // 2, length]], np.int32)
        chat.append(Document(ids, span, np.ones(1, np.float32), num_bytes=length))
    write_store(folder / "text", text, num_shards=3, name="text", vocab_tokens=VOCAB_TOKENS)
    write_store(folder / "chat", chat, num_shards=2, name="chat", vocab_tokens=VOCAB_TOKENS)
    return folder


def _run(groups: Groups, folder: Path, kind: str) -> tuple[Outcome, dict[int, Outcome]]:
    config = _config(kind, folder / "model")
    stores = [folder / source["name"] for source in config["data"]["sources"]]
    whole_dir = folder / f"{kind}-{groups.size}"
    whole = run_training(groups, whole_dir, config, stores, False)
    config["checkpoint"] = {}
    resumed = {}
    for step in STOPS[kind]:
        checkpoint = whole_dir / "checkpoints" / f"step-{step:08d}"
        run_dir = folder / f"{kind}-{groups.size}-from-{step}"
        resumed[step] = run_training(groups, run_dir, config, stores, False, resume=str(checkpoint))
    return whole, resumed


def _resume_elsewhere(groups: Groups, folder: Path, step: int) -> Outcome:
    config = _config("text", folder / "model")
    checkpoint = folder / "text-1" / "checkpoints" / f"step-{step:08d}"
    config["checkpoint"] = {}
    config["deepspeed"]["zero_optimization"]["stage"] = groups.size - 1
    run_dir = folder / f"text-1-on-{groups.size}"
    return run_training(groups, run_dir, config, [folder / "text"], False, resume=str(checkpoint))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("kind", "num_ranks"), [("text", 1), ("chat", 2), ("mixed", 2)])
def test_resumed_runs_equal_the_uninterrupted_one_bit_by_bit(folder: Path, kind: str, num_ranks: int) -> None:
    for whole, resumed in run_ranks(_run, num_ranks, folder, kind, timeout_seconds=380):
        assert len(whole.losses) > max(STOPS[kind]) + 1
        if kind == "mixed":
            stages = [record["stage"] for record in whole.records]
            border = stages.index(1)
            assert border + 1 in STOPS[kind], f"step {border} is the last of stage 0: a stop must be around it"
        for step, outcome in resumed.items():
            for name in ("loss", "loss_by_source", "grad_norm", "lr", "tokens_trained", "stage"):
                expected = [record[name] for record in whole.records[step:]]
                assert [record[name] for record in outcome.records] == expected, f"{name} after step {step}"
            assert [line["data_hash"] for line in outcome.data] == [line["data_hash"] for line in whole.data[step:]]
            assert outcome.state_digest == whole.state_digest, f"final state after a stop at step {step}"


@pytest.mark.timeout(400)
def test_resumed_on_other_ranks_and_with_another_stage(folder: Path) -> None:
    """ZeRO 3 on one rank goes on as ZeRO 2 on three and as ZeRO 1 on two: the same documents, the same losses."""
    if not (folder / "text-1").exists():
        run_ranks(_run, 1, folder, "text", timeout_seconds=380)
    losses = [record["loss"] for record in read_lines(folder / "text-1" / METRICS_NAME, "step")][6:]
    hashes = [line["data_hash"] for line in read_lines(folder / "text-1" / DATA_LOG_NAME)][6:]
    for size in (2, 3):
        outcome = run_ranks(_resume_elsewhere, size, folder, 6, timeout_seconds=200)[0]
        assert outcome.losses == pytest.approx(losses, rel=0, abs=1e-5)
        assert [line["data_hash"] for line in outcome.data] == hashes

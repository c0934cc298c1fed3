"""A loss that is not finite changes nothing: every rank skips the update, counts it, and too many in a row end the run.

The head has a bias of minus infinity for one token. A document that has it as a target has an infinite loss, while all
its gradients are finite: nothing but the loss itself can tell, and only one micro-batch of one rank has it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsft.train.loop
import dsft.train.start
from dsft.dist import Groups
from dsft.errors import TrainingError
from dsft.metrics.recorder import METRICS_NAME
from dsft.store.types import Document
from dsft.train.loop import train
from dsft.train.step import StepResult
from dsft.train.step_log import DATA_LOG_NAME
from tests.support.models import VOCAB, tiny_model
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run, read_lines, state_digest

pytestmark = [pytest.mark.launch]

POISON, PACK_TOKENS, STEP_PACKS = 7, 32, 4
STEPS = ("good", "good", "poisoned", "silent", "poisoned", "good", "good")
APPLIED = [kind == "good" for kind in STEPS]
WEIGHTS = {"good": {"good": 1.0}, "poisoned": {"good": 3.0, "poison": 1.0}, "silent": {"silent": 1.0}}
SOURCES = ("good", "poison", "silent")
ENGINES = [(stage, dtype, False) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]
ENGINES += [(stage, "bf16", True) for stage in (1, 2, 3)]


def _config(model: Path, stage: int, dtype: str, offload: bool, max_skipped_steps: int) -> dict[str, Any]:
    """One stage a step: every document fills a pack, so that a stage's end is a step's end."""
    step_tokens = STEP_PACKS * PACK_TOKENS
    offloaded = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    return {
        "model": {"path": str(model), "dtype": dtype},
        "data": {
            "pack_tokens": PACK_TOKENS,
            "sources": [{"name": name, "path": "-"} for name in SOURCES],
            "stages": [
                {"until_tokens": (number + 1) * step_tokens, "weights": WEIGHTS[kind]}
                for number, kind in enumerate(STEPS)
            ],
        },
        "train": {
            "tokens": len(STEPS) * step_tokens,
            "global_batch_packs": STEP_PACKS,
            "lr": 1e-3,
            "max_skipped_steps": max_skipped_steps,
            "schedule": {"kind": "constant"},
        },
        "deepspeed": {"zero_optimization": {"stage": stage, **offloaded}},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("not-finite")
    model = tiny_model("phi")
    with torch.no_grad():
        model.lm_head.bias[POISON] = -torch.inf
    model.save_pretrained(folder / "model")
    generator = np.random.default_rng(3)
    ids = generator.integers(POISON + 1, VOCAB, (64, PACK_TOKENS)).astype(np.int32)
    no_span = np.empty((0, 2), np.int32), np.empty(0, np.float32)
    write_store(folder / "good", [text_document(row.tolist()) for row in ids[:40]], name="good")
    write_store(folder / "silent", [Document(row, *no_span, num_bytes=1) for row in ids[40:52]], name="silent")
    ids[52:, PACK_TOKENS // 2] = POISON
    write_store(folder / "poison", [text_document(row.tolist()) for row in ids[52:]], name="poison")
    return folder


def _watched_train(groups: Groups, folder: Path, run_dir: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Train; per step whether it was applied, its gradient norm, and whether this rank's state is what it was."""
    steps: list[tuple[bool, float, bool]] = []
    real = dsft.train.loop.train_step

    def watched(engine: Any, *args: Any, **kwargs: Any) -> StepResult:
        before = _digest(engine)
        result = real(engine, *args, **kwargs)
        steps.append((result.applied, result.grad_norm, before == _digest(engine)))
        return result

    dsft.train.start.prove = lambda *_: None  # it would find the infinite bias
    dsft.train.loop.train_step = watched
    error = ""
    try:
        with built_run(groups, run_dir, config, [folder / name for name in SOURCES]) as (run, state, _, _):
            try:
                assert train(run, state) == "finished"
            except TrainingError as caught:
                error = str(caught)
            skipped, in_row, step = state.num_skipped, state.num_skipped_in_row, state.step
    finally:
        dsft.train.loop.train_step = real
    return {"steps": steps, "error": error, "skipped": skipped, "in_row": in_row, "step": step}


def _digest(engine: Any) -> str:
    """Masters, moments, and the weights that the model computes with."""
    digest = hashlib.sha256(state_digest(engine).encode())
    for parameter in engine.module.parameters():
        local = getattr(parameter, "ds_tensor", parameter).detach()
        digest.update(local.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _run_engines(groups: Groups, folder: Path) -> list[dict[str, Any]]:
    return [
        _watched_train(
            groups,
            folder,
            folder / f"zero{stage}-{dtype}-{offload}",
            _config(folder / "model", stage, dtype, offload, max_skipped_steps=3),
        )
        for stage, dtype, offload in ENGINES
    ]


@pytest.mark.timeout(420)
def test_every_engine_skips_the_step_on_all_ranks_and_goes_on(folder: Path) -> None:
    first, second = run_ranks(_run_engines, 2, folder, timeout_seconds=400)
    for (stage, dtype, offload), *ranks in zip(ENGINES, first, second, strict=True):
        name = f"zero{stage}-{dtype}-{offload}"
        for rank in ranks:
            assert [applied for applied, _, _ in rank["steps"]] == APPLIED, name
            assert [unchanged for _, _, unchanged in rank["steps"]] == [not applied for applied in APPLIED], name
            assert [np.isfinite(norm) for _, norm, _ in rank["steps"]] == [k != "poisoned" for k in STEPS], name
            assert (rank["skipped"], rank["in_row"], rank["step"], rank["error"]) == (3, 0, len(STEPS), ""), name
        run_dir = folder / name
        records = read_lines(run_dir / METRICS_NAME, "step")
        assert [record["applied"] for record in records] == APPLIED
        assert [record["num_skipped"] for record in records] == [0, 0, 1, 2, 3, 3, 3]
        assert [record["loss"] is not None for record in records] == APPLIED
        assert [line["applied"] for line in read_lines(run_dir / DATA_LOG_NAME)] == APPLIED
        warnings = [line["message"] for line in read_lines(run_dir / METRICS_NAME, "warning")]
        assert ["not finite" in text for text in warnings] == [True, False, True]
        assert "step 4: no update, none of its tokens is supervised" in warnings[1]


def _run_too_many(groups: Groups, folder: Path) -> dict[str, Any]:
    config = _config(folder / "model", 3, "fp32", offload=False, max_skipped_steps=2)
    return _watched_train(groups, folder, folder / "too-many", config)


@pytest.mark.timeout(420)
def test_too_many_in_a_row_stop_the_run_and_name_the_documents(folder: Path) -> None:
    for rank in run_ranks(_run_too_many, 2, folder, timeout_seconds=400):
        # The silent step between them neither counts nor makes the count begin anew.
        assert (rank["skipped"], rank["in_row"], rank["step"]) == (3, 2, 5)
        assert "2 steps in a row had a loss or gradient that is not finite; the last is step 5" in rank["error"]
        documents = rank["error"].partition("from 0): ")[2].partition(". ")[0].split(", ")
        assert len(documents) == STEP_PACKS
        assert sum(document.startswith("poison/0/") for document in documents) == 1
        assert sum(document.startswith("good/0/") for document in documents) == STEP_PACKS - 1
    assert not (folder / "too-many" / "checkpoints").exists()

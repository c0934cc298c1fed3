"""Evaluation in training: it changes nothing, comes when it is due, and may end the run, on all ranks alike."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dsft.train.evaluation
from dsft.checkpoint.discover import newest
from dsft.dist import Groups
from dsft.evaluate import held_out
from dsft.metrics.recorder import METRICS_NAME
from dsft.store.types import Document
from dsft.train.evaluation import EvaluationPlan
from dsft.train.loop import train
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run, read_lines, state_digest

pytestmark = [pytest.mark.launch]

VOCAB, PACK_TOKENS, STEP_PACKS, NUM_STEPS = 97, 32, 4, 12
STEP_TOKENS = PACK_TOKENS * STEP_PACKS
BORDERS = (4, 9)
"""Steps at which a stage ends, besides the last step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, few training documents (all as long as a pack), and held-out ones of another kind."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(4)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, attention_dropout=0.1, **shape)).save_pretrained(folder / "model")
    generator = np.random.default_rng(5)
    for name in ("text", "chat"):
        ids = generator.integers(3, VOCAB, (8, PACK_TOKENS))
        write_store(folder / name, [text_document(row.tolist()) for row in ids], name=name, vocab_tokens=VOCAB)
    held_out = []
    for length in generator.integers(10, 50, 9).tolist():
        span = np.array([[length // 2, length]], np.int32)
        ids = generator.integers(3, VOCAB, length).astype(np.int32)
        held_out.append(Document(ids, span, np.ones(1, np.float32), num_bytes=length))
    write_store(folder / "held", held_out, name="held", vocab_tokens=VOCAB)
    return folder


def _config(folder: Path, evaluate: dict[str, Any], **changes: Any) -> dict[str, Any]:
    borders = [border * STEP_TOKENS for border in (*BORDERS, NUM_STEPS)]
    weights = [{"text": 1.0}, {"text": 0.5, "chat": 0.5}, {"text": 0.5, "chat": 0.5}]
    held = {"name": "held", "path": "-", "format": "messages", "source": "text", "generate": 3, "max_new_tokens": 4}
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {
            "pack_tokens": PACK_TOKENS,
            "sources": [{"name": name, "path": "-"} for name in ("text", "chat")],
            "stages": [{"until_tokens": b, "weights": w} for b, w in zip(borders, weights, strict=True)],
        },
        "train": {
            "tokens": NUM_STEPS * STEP_TOKENS,
            "global_batch_packs": STEP_PACKS,
            "lr": 1e-2,
            "schedule": {"kind": "constant"},
        },
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}},
        "evaluate": {**evaluate, "sets": [held]} if evaluate else {},
        **changes,
    }


def _train(
    groups: Groups, folder: Path, name: str, config: dict[str, Any], resume: str | None = None
) -> tuple[str, int, str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Outcome, last step, digest of this rank's state, step records and evaluation records."""
    run_dir = folder / f"{name}-{groups.size}"
    stores = [folder / "text", folder / "chat"]
    held_out = [folder / "held"] if config["evaluate"] else []
    with built_run(groups, run_dir, config, stores, held_out=held_out, resume=resume) as (run, state, _, _):
        outcome = train(run, state)
        digest = state_digest(run.engine)
    path = run_dir / METRICS_NAME
    return outcome, state.step, digest, read_lines(path, "step"), read_lines(path, "evaluation")


def _with_and_without(groups: Groups, folder: Path) -> list[Any]:
    often = {"every_steps": 5, "at_start": True}
    cases = {"with": _config(folder, often), "without": _config(folder, {})}
    return [_train(groups, folder, name, config) for name, config in cases.items()]


@pytest.mark.timeout(420)
def test_evaluation_changes_nothing_and_comes_when_due(folder: Path) -> None:
    for rank in run_ranks(_with_and_without, 2, folder, timeout_seconds=400):
        (_, _, digest, steps, evaluations), (_, _, plain_digest, plain_steps, none) = rank
        assert len(steps) == len(plain_steps) == NUM_STEPS
        assert [record["loss"] for record in steps] == [record["loss"] for record in plain_steps]
        assert [record["grad_norm"] for record in steps] == [record["grad_norm"] for record in plain_steps]
        assert digest == plain_digest
        assert none == []
        assert [record["step"] for record in evaluations] == [0, BORDERS[0], 5, BORDERS[1], 10, NUM_STEPS]
        assert all(record["num_prompts"] == 3 for record in evaluations)
        # The training loss beside it is that of the steps since the evaluation before.
        losses = [record["loss_by_source"]["text"] for record in steps]
        weights = [record["weight_by_source"]["text"] for record in steps]
        for before, record in pairwise(evaluations):
            span = slice(before["step"], record["step"])
            assert record["train_loss"] == pytest.approx(np.average(losses[span], weights=weights[span]), rel=1e-12)


def _overfit_in_two_halves(groups: Groups, folder: Path) -> list[Any]:
    """Stopped between two evaluations and resumed in a fresh run folder, and never stopped."""
    watch = {"every_steps": 3, "at_stage_ends": False, "early_stop": {"patience": 2}}
    config = _config(folder, watch, checkpoint={"every_steps": 7, "keep_last": 9}, log={"every_steps": 2})
    whole = _train(groups, folder, "whole", config)
    checkpoint = folder / f"whole-{groups.size}" / "checkpoints" / "step-00000007"
    return [whole, _train(groups, folder, "resumed", config, resume=str(checkpoint))]


@pytest.mark.timeout(420)
def test_early_stop_on_all_ranks_also_after_a_resume(folder: Path) -> None:
    for rank in run_ranks(_overfit_in_two_halves, 2, folder, timeout_seconds=400):
        (outcome, step, digest, _, evaluations), (outcome_2, step_2, digest_2, _, evaluations_2) = rank
        assert (outcome, outcome_2) == ("early_stop", "early_stop")
        assert step == step_2 < NUM_STEPS
        assert digest == digest_2
        later = [record for record in evaluations if record["step"] > 7]
        assert [record["train_loss"] for record in evaluations_2] == [record["train_loss"] for record in later]
        assert [record["loss"] for record in evaluations_2] == [record["loss"] for record in later]
    for name in ("whole", "resumed"):
        found = newest(folder / f"{name}-2" / "checkpoints")
        assert found is not None
        assert found.name == f"step-{step:08d}", "an early stop saves"


def _forgotten_and_memorised(groups: Groups, folder: Path) -> list[Any]:
    """A run that forgets and learns by heart by design (high learning rate, few documents), and one that cannot."""
    probe = {"documents": 8, "prefix_tokens": 4, "continue_tokens": 4, "max_share": 0.0}
    outcomes = []
    for name, lr in (("faulty", 1e-1), ("clean", 1e-6)):
        config = _config(folder, {"every_steps": 4, "at_start": True, "at_stage_ends": False})
        config["evaluate"]["sets"][0].update({"max_rise": 0.05, "memorisation": probe, "generate": 0})
        config["train"]["lr"] = lr
        outcome, step, _, _, evaluations = _train(groups, folder, f"forgets-{name}", config)
        warnings = read_lines(folder / f"forgets-{name}-{groups.size}" / METRICS_NAME, "warning")
        outcomes.append((outcome, step, evaluations, [warning["message"] for warning in warnings]))
    return outcomes


@pytest.mark.timeout(420)
def test_a_run_that_forgets_ends_early_and_a_clean_one_does_not(folder: Path) -> None:
    for rank in run_ranks(_forgotten_and_memorised, 2, folder, timeout_seconds=400):
        (outcome, step, evaluations, warnings), (clean_outcome, clean_step, clean, clean_warnings) = rank
        assert (outcome, clean_outcome, clean_step) == ("early_stop", "finished", NUM_STEPS)
        assert step < NUM_STEPS
        assert evaluations[-1]["loss"] - evaluations[0]["loss"] > 0.05
        assert any("is being forgotten" in message for message in warnings)
        assert abs(clean[-1]["loss"] - clean[0]["loss"]) < 0.05
        assert not clean_warnings
        assert {record["num_probed"] for record in clean} == {8}


def _asked_to_stop(groups: Groups, folder: Path) -> tuple[Any, int]:
    """Rank 1 is asked to stop while the first evaluation runs."""
    real = dsft.train.evaluation.evaluate_all
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if groups.rank == 1:
            flags[0].requested = "SIGTERM"
        return real(*args, **kwargs)

    dsft.train.evaluation.evaluate_all = interrupted
    config = _config(folder, {"every_steps": 3, "at_stage_ends": False})
    flags: list[Any] = []
    try:
        stores = [folder / "text", folder / "chat"]
        with built_run(groups, folder / "asked", config, stores, held_out=[folder / "held"]) as (run, state, _, _):
            flags.append(run.stop)
            return (train(run, state), state.step), calls
    finally:
        dsft.train.evaluation.evaluate_all = real


@pytest.mark.timeout(420)
def test_a_stop_during_an_evaluation_stops_all_ranks_and_saves_without_another_evaluation(folder: Path) -> None:
    first, second = run_ranks(_asked_to_stop, 2, folder, timeout_seconds=400)
    assert first == second == (("stopped", 3), 1), "the message of step 4 was on its way already; it is not run"
    saved = newest(folder / "asked" / "checkpoints")
    assert saved is not None
    assert saved.name == "step-00000003"


def _stopped_in_an_evaluation(groups: Groups, folder: Path) -> dict[str, Any]:
    """Rank 1 is asked to stop in the second batch of an evaluation, in the middle of a run and at its end."""
    config = _config(folder, {"every_steps": 5, "at_stage_ends": False}, checkpoint={"every_steps": 5, "keep_last": 9})
    found: dict[str, Any] = {"whole": _train(groups, folder, "never-stopped", config)}
    collate = held_out.collate
    for which, name in ((1, "middle"), (3, "end")):
        num_batches: list[int] = []

        def counting(packs: Any, spec: Any, asked_in: int = which, num_batches: list[int] = num_batches) -> Any:
            batch = collate(packs, spec)
            num_batches[-1] += 1
            if groups.rank == 1 and len(num_batches) == asked_in and num_batches[-1] == 2:
                built.stop.request("SIGTERM", 1000.0)
            return batch

        measure = EvaluationPlan.measure

        def begun(self: Any, run: Any, state: Any, num_batches: list[int] = num_batches, plain: Any = measure) -> Any:
            num_batches.append(0)
            return plain(self, run, state)

        held_out.collate, EvaluationPlan.measure = counting, begun  # type: ignore[assignment, method-assign]
        stores, run_dir = [folder / "text", folder / "chat"], folder / f"stopped-{name}"
        with built_run(groups, run_dir, config, stores, held_out=[folder / "held"]) as (built, state, _, _):
            outcome = train(built, state)
            found[name] = (outcome, state.step, built.saver.saved_step, num_batches)
        held_out.collate, EvaluationPlan.measure = collate, measure  # type: ignore[method-assign]
        with built_run(groups, run_dir, config, stores, held_out=[folder / "held"], resume="auto") as (
            built,
            state,
            _,
            _,
        ):
            found[f"{name}, resumed"] = (train(built, state), state.step, state_digest(built.engine))
        found[f"{name}, evaluations"] = read_lines(run_dir / METRICS_NAME, "evaluation")
    return found


@pytest.mark.timeout(420)
def test_a_stop_ends_an_evaluation_between_two_batches(folder: Path) -> None:
    def told(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in record.items() if key not in ("time", "seconds")} for record in records]

    for found in run_ranks(_stopped_in_an_evaluation, 2, folder, timeout_seconds=400):
        _, last_step, digest, _, evaluations = found["whole"]
        assert [record["step"] for record in evaluations] == [5, 10, NUM_STEPS]
        for name, step, begun in (("middle", 5, 1), ("end", NUM_STEPS, 3)):
            outcome, stopped_at, saved_step, num_batches = found[name]
            assert (outcome, stopped_at, saved_step) == ("stopped", step, step)
            assert len(num_batches) == begun
            assert num_batches[-1] == 2, "the batch in which it was asked is the last"
            assert found[f"{name}, resumed"] == ("finished", last_step, digest)
            assert told(found[f"{name}, evaluations"]) == told(evaluations)

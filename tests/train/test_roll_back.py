"""A run whose data is bad for a while goes back, passes over that part, and can be proved.

One source whose shards are read one after the other. In one of them the documents are noise (the loss jumps), or hold a
token with an infinite loss; the others repeat a pattern that the model soon knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dsft.train.roll_back
import dsft.train.start
from dsft.checkpoint.discover import checkpoints, load_state
from dsft.cli.verify_run import print_report
from dsft.config.spikes import SpikeSection
from dsft.dist import Groups
from dsft.errors import TrainingError
from dsft.metrics.recorder import METRICS_NAME
from dsft.sampling.order import SourceOrder
from dsft.sampling.types import PlannedSource
from dsft.store.types import Document
from dsft.train.attempts import ATTEMPTS_NAME
from dsft.train.loop import train
from dsft.train.spikes import SpikeWatch
from dsft.train.verify_run import verify_run
from tests.support.models import VOCAB, tiny_model
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run, read_lines, state_digest

pytestmark = [pytest.mark.launch]

PACK_TOKENS, STEP_PACKS, SHARD_STEPS, NUM_SHARDS, BAD_PLACE = 32, 2, 4, 10, 7
INFINITE = 7
FIRST_BAD = BAD_PLACE * SHARD_STEPS + 1
NUM_STEPS = NUM_SHARDS * SHARD_STEPS
CONFIRM, REWIND, EVERY = 3, 2, 3
NOISE, NOT_FINITE, CLEAN = "noise", "not-finite", "clean"


def _config(folder: Path, *, spikes: bool = True, **changes: Any) -> dict[str, Any]:
    section = {"window_steps": 8, "deviations": 6.0, "confirm_steps": CONFIRM, "rewind_steps": REWIND}
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {
            "pack_tokens": PACK_TOKENS,
            "sources": [{"name": "text", "path": "-"}],
            "group_shards": 1,
            "window_documents": SHARD_STEPS * STEP_PACKS,
        },
        "train": {
            "epochs": 1,
            "global_batch_packs": STEP_PACKS,
            "lr": 1e-2,
            "max_skipped_steps": CONFIRM,
            "schedule": {"kind": "constant"},
            **({"spikes": {**section, **changes}} if spikes else {}),
        },
        "deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        "checkpoint": {"every_steps": EVERY, "keep_last": 4},
    }


def _good(generator: np.random.Generator) -> Document:
    """Tokens that follow each other in a circle of 8."""
    start = int(generator.integers(8))
    return text_document([10 + (start + place) % 8 for place in range(PACK_TOKENS)])


def _bad(kind: str, generator: np.random.Generator) -> Document:
    ids = generator.integers(30, VOCAB, PACK_TOKENS)
    if kind == NOT_FINITE:
        ids[PACK_TOKENS // 2] = INFINITE
    return text_document(ids.tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roll-back")
    model = tiny_model("phi")
    with torch.no_grad():
        model.lm_head.bias[INFINITE] = -torch.inf
    model.save_pretrained(folder / "model")
    num_documents = SHARD_STEPS * STEP_PACKS
    source = PlannedSource("text", NUM_SHARDS, lambda shard: np.full(num_documents, PACK_TOKENS, np.int32))
    order = SourceOrder(source, seed=17, group_shards=1, pack_tokens=PACK_TOKENS, overlong="split")
    bad_shard = int(order.shards_of_group(0, BAD_PLACE)[0])
    for kind in (NOISE, NOT_FINITE, CLEAN):
        generator = np.random.default_rng(3)
        documents = [_good(generator) for _ in range(NUM_SHARDS * num_documents)]
        if kind != CLEAN:
            bad = slice(bad_shard * num_documents, (bad_shard + 1) * num_documents)
            documents[bad] = [_bad(kind, generator) for _ in range(num_documents)]
        write_store(folder / kind, documents, num_shards=NUM_SHARDS, name="text", vocab_tokens=VOCAB)
    return folder


def _train(
    groups: Groups, folder: Path, kind: str, run_dir: Path, config: dict[str, Any], resume: str | None = None
) -> tuple[str, int, str]:
    dsft.train.start.prove = lambda *_: None  # it would find the infinite bias
    with built_run(groups, run_dir, config, [folder / kind], resume=resume) as (run, state, _, _):
        outcome = train(run, state)
        assert state.step == run.saver.saved_step
        assert state.tokens_trained == NUM_STEPS * STEP_PACKS * PACK_TOKENS
        return outcome, state.step, state_digest(run.engine)


def _die_after_going_back(groups: Groups, folder: Path, kind: str, run_dir: Path) -> None:
    """The run ends as soon as it has written down that it goes back."""
    append = dsft.train.roll_back.append_attempt

    def append_and_die(*arguments: Any) -> None:
        append(*arguments)
        raise KeyError("died")

    dsft.train.roll_back.append_attempt = append_and_die
    try:
        with pytest.raises((KeyError, TrainingError), match="died"):
            _train(groups, folder, kind, run_dir, _config(folder))
    finally:
        dsft.train.roll_back.append_attempt = append


def _go_back(groups: Groups, folder: Path, kind: str) -> list[tuple[str, int, str]]:
    """Without a death, and with one and a resume."""
    name = f"{kind}-{groups.size}"
    whole = _train(groups, folder, kind, folder / name, _config(folder))
    _die_after_going_back(groups, folder, kind, folder / f"{name}-died")
    return [whole, _train(groups, folder, kind, folder / f"{name}-died", _config(folder), resume="auto")]


def _move_where_it_went_on(run_dir: Path) -> None:
    """Say in the log of attempts that the run went on one pack later than it did."""
    lines = [json.loads(line) for line in (run_dir / ATTEMPTS_NAME).read_text().splitlines()]
    for line in lines:
        if line["passed"]:
            line["passed"]["cursor"]["pack"] += 1
    (run_dir / ATTEMPTS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "num_ranks"), [(NOISE, 2), (NOT_FINITE, 2), (NOISE, 1)])
def test_a_spiked_run_goes_back_and_is_proved(
    folder: Path, kind: str, num_ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    last_bad = FIRST_BAD + CONFIRM - 1
    target = max(step for step in range(0, FIRST_BAD - REWIND, EVERY))
    for outcomes in run_ranks(_go_back, num_ranks, folder, kind, timeout_seconds=280):
        (_, whole_step, whole), (_, _, resumed) = outcomes
        assert [outcome for outcome, _, _ in outcomes] == ["finished"] * 2
        assert whole_step == NUM_STEPS - (last_bad - target), "what was passed over is not trained on"
        assert resumed == whole, "a run that dies while it goes back ends as one that does not"
    for name in (f"{kind}-{num_ranks}", f"{kind}-{num_ranks}-died"):
        report = verify_run(folder / name, lambda step, last: None)
        assert report.problems == ()
        (passed,) = report.passed_over
        assert (passed.after_step, passed.steps) == (target, last_bad - target)
        assert passed.tokens == passed.steps * STEP_PACKS * PACK_TOKENS
        assert f"steps {FIRST_BAD} to {last_bad}" in passed.cause
        assert [(a["first_step"], a["last_step"]) for a in report.attempts] == [(1, target), (target + 1, whole_step)]
        newest = load_state(checkpoints(folder / name / "checkpoints")[0])["train"]
        assert (newest["step"], newest["num_roll_backs"], newest["tokens_skipped"]) == (whole_step, 1, passed.tokens)
    print_report(report)
    assert f"passed over on purpose after step {target}: {passed.steps} steps of the plan" in capsys.readouterr().out
    _move_where_it_went_on(folder / name)
    (problem,) = verify_run(folder / name, lambda step, last: None).problems
    assert f"went on after step {target} at a place in the data at which no step of the plan ends" in problem
    run_dir = folder / f"{kind}-{num_ranks}"
    warnings = [line["message"] for line in read_lines(run_dir / METRICS_NAME, "warning")]
    assert sum("the run goes back" in text.lower() for text in warnings) == 1
    records = read_lines(run_dir / METRICS_NAME)
    ((place, resumed_at),) = [(n, record) for n, record in enumerate(records) if record["kind"] == "resume"]
    assert resumed_at["step"] == target
    saved = [record["step"] for record in records[:place] if record["kind"] == "checkpoint"]
    assert max(saved) < FIRST_BAD, "no checkpoint is made while the loss is high"


def _other_runs(groups: Groups, folder: Path) -> dict[str, Any]:
    off = _config(folder, spikes=False)
    found = {
        "off": _train(groups, folder, CLEAN, folder / "off", off),
        "on": _train(groups, folder, CLEAN, folder / "on", _config(folder)),
    }
    with pytest.raises(TrainingError) as caught:
        _train(groups, folder, NOISE, folder / "young", _config(folder) | {"checkpoint": {"every_steps": 1000}})
    found["young"] = str(caught.value)
    _die_after_going_back(groups, folder, NOISE, folder / "moved")
    return found


def _resume_moved(groups: Groups, folder: Path) -> tuple[str, int, str]:
    return _train(groups, folder, NOISE, folder / "moved", _config(folder, max_roll_backs=1), resume="auto")


@pytest.mark.timeout(300)
def test_a_clean_run_is_left_alone_and_another_number_of_ranks_passes_over_the_same(folder: Path) -> None:
    first, second = run_ranks(_other_runs, 2, folder, timeout_seconds=280)
    for found in (first, second):
        assert found["on"] == found["off"], "bit-equal"
        assert "no checkpoint of before it" in found["young"]
    assert not read_lines(folder / "on" / METRICS_NAME, "resume")
    run_ranks(_resume_moved, 1, folder, timeout_seconds=280)
    report = verify_run(folder / "moved", lambda step, last: None)
    assert report.problems == ()
    assert [attempt["world_size"] for attempt in report.attempts] == [2, 1]
    assert len(report.passed_over) == 1


def test_after_enough_roll_backs_the_run_ends_with_advice() -> None:
    run: Any = SimpleNamespace(spikes=SpikeWatch(SpikeSection(max_roll_backs=2), {}))
    state: Any = SimpleNamespace(num_roll_backs=2, step=60)
    with pytest.raises(TrainingError, match=r"steps 56 to 60 \(loss 9\).* gone back 2 times already"):
        dsft.train.roll_back.roll_back(run, state, dsft.train.roll_back.Spike(56, "loss 9"))

"""The edges of the loop: what fails on one rank fails on all alike, and a finished run can be extended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsft.batch.loader
from dsft.dist import Groups
from dsft.errors import DataError, SaveError
from dsft.metrics.recorder import METRICS_NAME
from dsft.train.loop import train
from dsft.train.verify_run import verify_run
from tests.support.models import VOCAB, tiny_model
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run, read_lines

pytestmark = [pytest.mark.launch]

PACK_TOKENS, STEP_PACKS = 32, 4
STEP_TOKENS = PACK_TOKENS * STEP_PACKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    tiny_model("llama").save_pretrained(folder / "model")
    generator = np.random.default_rng(3)
    documents = [text_document(generator.integers(3, VOCAB, PACK_TOKENS).tolist()) for _ in range(40)]
    write_store(folder / "text", documents, num_shards=2, name="text", vocab_tokens=VOCAB)
    return folder


def _config(folder: Path, tokens: int) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"pack_tokens": PACK_TOKENS, "sources": [{"name": "text", "path": "-"}]},
        "train": {"tokens": tokens, "global_batch_packs": STEP_PACKS, "lr": 1e-3},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }


def _fails(groups: Groups, folder: Path, run_dir: Path) -> tuple[str, str, int]:
    with built_run(groups, run_dir, _config(folder, 9 * STEP_TOKENS), [folder / "text"]) as (run, state, _, _):
        try:
            train(run, state)
        except (DataError, SaveError) as error:
            return type(error).__name__, str(error), state.step
    return "nothing", "", state.step


def _failing_ranks(groups: Groups, folder: Path) -> list[tuple[str, str, int]]:
    full = folder / "full"
    if groups.rank == 0:
        full.mkdir()
        (full / METRICS_NAME).symlink_to("/dev/full")
    groups.barrier()
    results = [_fails(groups, folder, full)]
    real, calls = dsft.batch.loader.collate_rows, 0

    def unreadable(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if groups.rank == 1 and calls == 3:
            raise OSError(5, "Input/output error")
        return real(*args)

    dsft.batch.loader.collate_rows = unreadable
    results.append(_fails(groups, folder, folder / "unreadable"))
    dsft.batch.loader.collate_rows = real
    return results


@pytest.mark.timeout(420)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_fails_on_one_rank_ends_all_of_them_with_the_same_error(folder: Path) -> None:
    for log, data in run_ranks(_failing_ranks, 2, folder, timeout_seconds=400):
        kind, message, step = log
        assert kind == "SaveError"
        assert "metrics.jsonl: No space left on device" in message
        assert "(rank 0 on " in message
        assert step == 2  # the message of the next step had been sent before the first record was written
        kind, message, step = data
        assert kind == "DataError"
        assert "Input/output error" in message
        assert "(rank 1 on " in message
        assert step == 2


def _extended(groups: Groups, folder: Path) -> list[tuple[str, int, int]]:
    """To the end with a short last step, once more to the same end, and then on."""
    run_dir = folder / "extended"
    seen = []
    first_end = 3 * STEP_TOKENS + 2 * PACK_TOKENS
    for tokens, resume in ((first_end, None), (first_end, "auto"), (8 * STEP_TOKENS, "auto")):
        longer = tokens != first_end
        with built_run(
            groups, run_dir, _config(folder, tokens), [folder / "text"], resume=resume, allow_lr_jump=longer
        ) as (
            run,
            state,
            _,
            _,
        ):
            assert train(run, state) == "finished"
        newest = max((run_dir / "checkpoints").glob("step-*/MANIFEST.json"))
        seen.append((newest.parent.name, newest.stat().st_ino, state.tokens_trained))
    return seen


@pytest.mark.timeout(420)
def test_a_finished_run_is_not_saved_again_and_can_be_extended(folder: Path) -> None:
    for first, again, longer in run_ranks(_extended, 2, folder, timeout_seconds=400):
        assert first[0] == "step-00000004"
        assert again == first, "resumed at its end: the same checkpoint, the same file"
        assert (longer[0], longer[2]) == ("step-00000009", 8 * STEP_TOKENS)
    records = read_lines(folder / "extended" / METRICS_NAME, "step")
    tokens = np.diff([0, *(record["tokens_trained"] for record in records)])
    short = 2 * PACK_TOKENS  # the last step of the first run, and what its window left for the last step of the second
    assert tokens.tolist() == [STEP_TOKENS] * 3 + [short] + [STEP_TOKENS] * 4 + [short]
    report = verify_run(folder / "extended", lambda *_: None)
    assert report.is_proved, report.problems
    (epoch,) = report.sources["text"]
    assert (epoch.documents, epoch.tokens) == (32, 8 * STEP_TOKENS), "no document twice, none left out"

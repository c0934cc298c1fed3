"""A stop that one rank was asked for: saved when there is time, and said plainly when there is not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsft.checkpoint.snapshot import Snapshot
from dsft.dist import Groups
from dsft.metrics.recorder import METRICS_NAME
from dsft.train.loop import Run, train
from dsft.train.saving import Saver
from dsft.train.state import TrainState
from tests.support.models import VOCAB, tiny_model
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run, read_lines

pytestmark = [pytest.mark.launch]

PACK_TOKENS, EVERY_STEPS = 32, 3
SAVE_SECONDS = 1.5


def _stop(groups: Groups, folder: Path, config: dict[str, Any], grace_seconds: float, resume: str | None) -> Any:
    """Train; rank 1 is asked to stop when the first save has begun, which takes ``SAVE_SECONDS`` at least."""
    begin, write = Saver.begin, Snapshot.write

    def begin_and_stop(self: Saver, run: Run, state: TrainState) -> None:
        begin(self, run, state)
        if groups.rank == 1:
            run.stop.request("SIGTERM", grace_seconds)

    def slow(self: Snapshot, folder: Path) -> Any:
        time.sleep(SAVE_SECONDS)
        return write(self, folder)

    Saver.begin, Snapshot.write = begin_and_stop, slow  # type: ignore[method-assign]
    with built_run(groups, folder / "run", config, [folder / "text"], resume=resume) as (run, state, _, _):
        outcome = train(run, state)
        Saver.begin, Snapshot.write = begin, write  # type: ignore[method-assign]
        return outcome, state.step, run.saver.saved_step


def _both(groups: Groups, folder: Path) -> list[Any]:
    config = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"pack_tokens": PACK_TOKENS, "sources": [{"name": "text", "path": "-"}]},
        "train": {"steps": 100, "global_batch_packs": 2, "lr": 1e-3},
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "checkpoint": {"every_steps": EVERY_STEPS},
    }
    late = _stop(groups, folder, config, SAVE_SECONDS / 2, None)
    return [late, _stop(groups, folder, config, 1000.0, "auto")]


@pytest.mark.timeout(300)
def test_a_stop_saves_if_there_is_time_and_else_names_what_stands(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(3)
    documents = [text_document(generator.integers(3, VOCAB, PACK_TOKENS).tolist()) for _ in range(40)]
    write_store(tmp_path / "text", documents, num_shards=2, name="text", vocab_tokens=VOCAB)
    for late, in_time in run_ranks(_both, 2, tmp_path, timeout_seconds=280):
        outcome, step, saved = late
        assert outcome == "out_of_time"
        assert saved == EVERY_STEPS
        assert saved < step <= saved + 2, "a stop is seen at most two steps after the request"
        outcome, step, saved = in_time
        assert outcome == "stopped"
        assert 2 * EVERY_STEPS < step <= 2 * EVERY_STEPS + 2
        assert saved == step
    warnings = [record["message"] for record in read_lines(tmp_path / "run" / METRICS_NAME, "warning")]
    (said,) = [text for text in warnings if "is not saved" in text]
    assert "until this run is killed, and the last save took" in said
    assert f"the checkpoint of step {EVERY_STEPS} stands, and --resume auto goes on from it" in said

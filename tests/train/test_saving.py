"""Training goes on while a checkpoint is written, and the checkpoint is of the step at which its save began."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsft.checkpoint.manifest import checkpoint_name
from dsft.checkpoint.snapshot import Snapshot
from dsft.dist import Groups
from dsft.errors import DataError
from dsft.metrics.recorder import METRICS_NAME
from dsft.train.loop import train
from tests.support.hosts import LOCAL_DIR, playing_host
from tests.support.models import VOCAB, tiny_model
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run, read_lines, state_digest

pytestmark = [pytest.mark.launch]

NUM_STEPS, EVERY_STEPS, LATE_STEPS, PACK_TOKENS = 11, 4, 2, 32


def _config(folder: Path, stage: int, local_dir: str | None = None) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"pack_tokens": PACK_TOKENS, "sources": [{"name": "text", "path": "-"}]},
        "train": {"steps": NUM_STEPS, "global_batch_packs": 2, "lr": 1e-3},
        "deepspeed": {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}},
        "checkpoint": {"every_steps": EVERY_STEPS, "keep_last": 9, "local_dir": local_dir},
    }


def _train(groups: Groups, folder: Path, run_dir: Path, stage: int, resume: str | None) -> str:
    """Each writer begins only when ``LATE_STEPS`` more steps have been taken, or the run has come to its end.

    With ZeRO 3 each rank is a host with a disk, and rank 1's is another one for each start.
    """
    write = Snapshot.write
    config = _config(folder, stage, LOCAL_DIR if stage == 3 else None)
    host = "a" if groups.rank == 0 else run_dir.name
    with (
        playing_host(folder, host),
        built_run(groups, run_dir, config, [folder / "text"], resume=resume) as (run, state, _, _),
    ):

        def late(self: Snapshot, staging: Path) -> Any:
            step = state.step
            while state.step < min(step + LATE_STEPS, NUM_STEPS):
                time.sleep(0.01)
            return write(self, staging)

        Snapshot.write = late  # type: ignore[method-assign]
        try:
            assert train(run, state) == "finished"
        finally:
            Snapshot.write = write  # type: ignore[method-assign]
        return state_digest(run.engine)


def _train_and_resume(groups: Groups, folder: Path, stage: int) -> list[str]:
    whole = folder / f"whole-{stage}"
    digests = [_train(groups, folder, whole, stage, None)]
    for step in range(EVERY_STEPS, NUM_STEPS, EVERY_STEPS):
        resume = str(whole / "checkpoints" / checkpoint_name(step))
        digests.append(_train(groups, folder, folder / f"{stage}-from-{step}", stage, resume))
    return digests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    tiny_model("llama").save_pretrained(folder / "model")
    generator = np.random.default_rng(3)
    documents = [text_document(generator.integers(3, VOCAB, PACK_TOKENS).tolist()) for _ in range(40)]
    write_store(folder / "text", documents, num_shards=2, name="text", vocab_tokens=VOCAB)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [1, 3])
def test_steps_are_taken_while_a_checkpoint_is_written(folder: Path, stage: int) -> None:
    for digests in run_ranks(_train_and_resume, 2, folder, stage, timeout_seconds=280):
        assert len(digests) == 3
        assert len(set(digests)) == 1, "a resume from each checkpoint ends as the run that was not stopped"
    records = read_lines(folder / f"whole-{stage}" / METRICS_NAME)
    saves = [(place, record) for place, record in enumerate(records) if record["kind"] == "checkpoint"]
    assert [record["step"] for _, record in saves] == [4, 8, NUM_STEPS]
    place, first = saves[0]
    steps = [one["step"] for one in records[:place] if one["kind"] == "step"]
    assert first["step"] + LATE_STEPS <= steps[-1] < NUM_STEPS, "committed between two later steps"
    assert all(record["stall_seconds"] > 0.0 for _, record in saves)
    assert all(record["write_seconds"] > 0.0 for _, record in saves)


def _fail_while_saving(groups: Groups, folder: Path) -> list[str]:
    """The data of the step after a save cannot be read; its writer is slow."""
    write, run_dir = Snapshot.write, folder / "failing"
    with built_run(groups, run_dir, _config(folder, 3), [folder / "text"]) as (run, state, _, _):

        def slow(self: Snapshot, staging: Path) -> Any:
            time.sleep(1.0)
            return write(self, staging)

        steps = run.loader.steps

        def unreadable(cursor: Any) -> Any:
            for number, batch in enumerate(steps(cursor)):
                if number > EVERY_STEPS:
                    raise OSError(5, "Input/output error")
                yield batch

        run.loader.steps = unreadable  # type: ignore[method-assign]
        Snapshot.write = slow  # type: ignore[method-assign]
        with pytest.raises(DataError):
            train(run, state)
        Snapshot.write = write  # type: ignore[method-assign]
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.timeout(200)
def test_a_run_that_fails_leaves_its_save_behind_as_a_crash_would(folder: Path) -> None:
    (left,) = run_ranks(_fail_while_saving, 1, folder, timeout_seconds=180)
    assert len(left) == 1
    assert left[0].startswith(".step-00000004.")

"""A failed save does not end training; a row of them does, with what is wrong and what stands. On a real small disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsft.checkpoint.discover import newest
from dsft.dist import Groups
from dsft.errors import SaveError
from dsft.metrics.recorder import METRICS_NAME
from dsft.train.loop import Run, train
from dsft.train.saving import Saver
from dsft.train.state import TrainState
from tests.support.models import VOCAB, tiny_model
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run, read_lines

pytestmark = [pytest.mark.launch]

DISK_MIB, NUM_STEPS, PACK_TOKENS = 64, 12, 32
GOOD_SAVES = (1, 3, 5, 7)
"""The save of step 2 finds the disk full, that of 4 while it writes, 6 a read-only disk, 8 and 9 no folder."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Disk:
    """What happens to the disk; called on rank 0 before the save of a step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.filler = folder / "filler"
        self.fill_at_open = False
        sys.addaudithook(self._opened)

    def before_save(self, step: int) -> None:
        changes: dict[int, Callable[[], None]] = {
            2: self._fill,
            3: self.filler.unlink,
            4: lambda: setattr(self, "fill_at_open", True),
            5: self.filler.unlink,
            6: lambda: self._remount("ro"),
            7: lambda: self._remount("rw"),
            8: lambda: self._rename("checkpoints", "gone"),
        }
        changes.get(step, lambda: None)()

    def bring_back(self) -> None:
        self._rename("gone", "checkpoints")

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.fill_at_open and ".tmp/" in str(arguments[0]):
            self.fill_at_open = False
            self._fill()

    def _fill(self) -> None:
        with open(self.filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                return

    def _remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], check=True)

    def _rename(self, old: str, new: str) -> None:
        (self.folder / old).rename(self.folder / new)


def _train(groups: Groups, folder: Path, run_dir: Path, disk_folder: Path) -> tuple[str, int]:
    config = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"pack_tokens": PACK_TOKENS, "sources": [{"name": "text", "path": "-"}]},
        "train": {"steps": NUM_STEPS, "global_batch_packs": 2, "lr": 1e-3},
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "checkpoint": {"every_steps": 1, "keep_last": 1, "max_failed_saves": 2},
    }
    disk = Disk(disk_folder) if groups.rank == 0 else None
    begin = Saver._begin

    def begin_on_a_bad_disk(self: Saver, run: Run, state: TrainState) -> None:
        if disk is not None:
            disk.before_save(state.step)
        begin(self, run, state)

    Saver._begin = begin_on_a_bad_disk  # type: ignore[method-assign]
    with (
        built_run(groups, run_dir, config, [folder / "text"]) as (run, state, _, _),
        pytest.raises(SaveError) as caught,
    ):
        train(run, state)
    if disk is not None:
        disk.bring_back()
    return str(caught.value), state.step


@pytest.mark.timeout(120)
def test_failed_saves_do_not_stop_training_until_too_many_in_a_row(tmp_path: Path, disk: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(3)
    documents = [text_document(generator.integers(3, VOCAB, PACK_TOKENS).tolist()) for _ in range(40)]
    write_store(tmp_path / "text", documents, num_shards=2, name="text", vocab_tokens=VOCAB)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (disk / "checkpoints").mkdir()
    (run_dir / "checkpoints").symlink_to(disk / "checkpoints")

    for message, step in run_ranks(_train, 2, tmp_path, run_dir, disk, timeout_seconds=100):
        assert step == 9
        assert "step 9 could not be saved (2 of 2 in a row); step 7 stands" in message
        assert f"{run_dir}/checkpoints" in message
    steps = [record["step"] for record in read_lines(run_dir / METRICS_NAME, "checkpoint")]
    assert tuple(steps) == GOOD_SAVES
    warnings = [record["message"] for record in read_lines(run_dir / METRICS_NAME, "warning")]
    full, while_writing, read_only, gone = [w for w in warnings if "could not be saved" in w]
    assert "step 2 could not be saved (1 of 2 in a row), training goes on; step 1 stands" in full
    assert f"{run_dir}/checkpoints: it needs about" in full
    assert "bytes are missing" in full
    assert "step 3 stands" in while_writing
    assert "No space left on device" in while_writing
    assert "Read-only file system" in read_only
    assert "step 8 could not be saved (1 of 2 in a row)" in gone
    checkpoint = newest(run_dir / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-00000007"

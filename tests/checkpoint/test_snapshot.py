"""A slow writer while the optimizer goes on: the file must hold the state of the moment at which the save began."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.checkpoint import snapshot
from dsft.checkpoint.layout import shard_name
from dsft.checkpoint.snapshot import Snapshot, SnapshotMemory
from dsft.dist import Groups
from dsft.errors import SaveError
from tests.support.ranks import run_ranks
from tests.support.toy_engine import SETTINGS, make_engine, train

pytestmark = [pytest.mark.launch]

PIECE_BYTES, MEMORY_BYTES = 512, 1500
"""So that the toy's state has some fifty pieces, of which the small memory holds two."""
NUM_WRITTEN = 6
"""Pieces that the writer gets rid of before the step."""
ALL = 1000


class GatedSnapshot(Snapshot):
    """Its writer begins a piece only when it is let through."""

    def __init__(self, engine: Any, memory: SnapshotMemory) -> None:
        super().__init__(engine, memory)
        self.passes = threading.Semaphore(0)

    def _begin(self, number: int) -> torch.Tensor:
        self.passes.acquire()
        return super()._begin(number)


def _step_meanwhile(groups: Groups, engine: Any, folder: Path, memory_bytes: int, secure: bool) -> tuple[bool, bool]:
    """Save while two steps are taken; returns whether the step had to wait for the writer, and whether the file holds
    what a save at once of the same state did.
    """
    for name in ("at once", "meanwhile"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Snapshot(engine, SnapshotMemory(0)).write(folder / "at once")
    saved = GatedSnapshot(engine, SnapshotMemory(memory_bytes))
    writer = threading.Thread(target=saved.write, args=(folder / "meanwhile",), daemon=True)
    writer.start()
    saved.passes.release(NUM_WRITTEN)
    while saved._num_read < NUM_WRITTEN:
        time.sleep(0.01)
    securing = threading.Thread(target=saved.secure if secure else lambda: None, daemon=True)
    securing.start()
    securing.join(0.3 if memory_bytes == MEMORY_BYTES else 60)
    waited = securing.is_alive()
    if waited:
        saved.passes.release(ALL)
    securing.join(60)
    for name, buffer in engine.module.named_buffers():
        if name.endswith("count"):
            buffer.add_(1)
    train(engine, 100, 1, groups)
    if secure:
        saved.secure()  # of the second step: there is nothing left to do
    train(engine, 101, 1, groups)
    saved.passes.release(ALL)
    writer.join(60)
    files = [(folder / name / shard_name(groups.rank)).read_bytes() for name in ("at once", "meanwhile")]
    return waited, files[0] == files[1]


def save_while_training(groups: Groups, folder: str, name: str) -> list[tuple[bool, bool]]:
    snapshot.PIECE_BYTES = PIECE_BYTES
    engine = make_engine(SETTINGS[name], seed=1)
    train(engine, 0, 2, groups)
    return [
        _step_meanwhile(groups, engine, Path(folder) / name / str(number), memory_bytes, secure)
        for number, (memory_bytes, secure) in enumerate(((10**6, True), (MEMORY_BYTES, True), (10**6, False)))
    ]


def save_while_training_all(groups: Groups, folder: str) -> dict[str, list[tuple[bool, bool]]]:
    return {name: save_while_training(groups, folder, name) for name in SETTINGS}


@pytest.mark.timeout(300)
def test_a_save_holds_the_state_of_the_moment_at_which_it_began(tmp_path: Path) -> None:
    for found in run_ranks(save_while_training_all, 2, str(tmp_path), timeout_seconds=280):
        assert found.keys() == SETTINGS.keys()
        for name, (enough, small, unsecured) in found.items():
            assert enough == (False, True), f"{name}: all is copied, the step does not wait for the writer"
            assert small == (True, True), f"{name}: the memory is full, the step waits"
            assert unsecured == (False, False), f"{name}: without it, the steps are seen in the file"


def fail_while_training(groups: Groups, folder: str) -> list[str]:
    """A writer that fails, and one that is abandoned, let the step go on."""
    snapshot.PIECE_BYTES = PIECE_BYTES
    engine = make_engine(SETTINGS["stage 3 offload"], seed=1)
    train(engine, 0, 1, groups)
    caught = []
    for number, abandon in enumerate((False, True)):
        saved = Snapshot(engine, SnapshotMemory(0))
        where = Path(folder) / str(number)
        if abandon:
            where.mkdir()
            saved.abandon()
        try:
            saved.write(where)
        except (OSError, SaveError) as error:
            caught.append(type(error).__name__)
        saved.secure()
    return caught


def test_a_step_does_not_wait_for_a_writer_that_failed(tmp_path: Path) -> None:
    assert run_ranks(fail_while_training, 1, str(tmp_path), timeout_seconds=100) == [["FileNotFoundError", "SaveError"]]


def test_the_memory_is_bounded_and_used_again() -> None:
    memory = SnapshotMemory(1000)
    first = memory.take(600, pinned=False)
    assert (first.dtype, len(first)) == (torch.uint8, 600)
    assert memory.take(500, pinned=False).data_ptr() == first.data_ptr()
    assert len(memory.take(5000, pinned=False)) == 1000

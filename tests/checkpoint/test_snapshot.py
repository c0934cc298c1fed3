"""A slow writer while the optimizer goes on: the file must hold the state of the moment at which the save began."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsft.checkpoint import snapshot
from dsft.checkpoint.snapshot import Snapshot, SnapshotMemory
from dsft.dist import Groups
from dsft.errors import SaveError
from tests.support.ranks import run_ranks
from tests.support.snapshots import PIECE_BYTES, save_while_training
from tests.support.toy_engine import SETTINGS, make_engine, train

pytestmark = [pytest.mark.launch]


def save_while_training_all(groups: Groups, folder: str) -> dict[str, list[tuple[bool, bool]]]:
    return {name: save_while_training(groups, Path(folder), name) for name in SETTINGS}


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

"""What a host says of itself: its disk for shards, and locks of op builds, which come and go while it looks."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dsft.launch import probe


def test_the_disk_for_shards(tmp_path: Path) -> None:
    found = probe._local_dir(str(tmp_path), "/dev/shm")
    free_bytes = found.pop("free_bytes")
    assert found == {
        "error": None,
        "is_on_run_dir": tmp_path.stat().st_dev == os.stat("/dev/shm").st_dev,
    }
    assert free_bytes > 0
    assert list(tmp_path.iterdir()) == []
    assert probe._local_dir(str(tmp_path), str(tmp_path))["is_on_run_dir"]
    absent = probe._local_dir(str(tmp_path / "absent"), str(tmp_path))
    assert absent == {
        "error": "No such file or directory",
        "is_on_run_dir": False,
        "free_bytes": None,
    }


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


def test_a_lock_that_was_left_behind_is_held_by_nobody_and_one_in_use_by_its_process(lock: Path) -> None:
    lock.touch()
    assert probe._locks("", str(lock.parents[1])) == {str(lock): None}
    with lock.open():
        assert probe._locks("", str(lock.parents[1])) == {str(lock): os.getpid()}


@pytest.mark.parametrize("is_taken_again", [False, True])
def test_a_lock_that_is_released_while_the_host_looks_does_not_count(lock: Path, is_taken_again: bool) -> None:
    lock.touch()

    def release() -> None:
        lock.rename(lock.with_name("old"))  # kept, so that the next file is not given its number
        if is_taken_again:
            lock.touch()

    timer = threading.Timer(probe._SECOND_LOOK_SECONDS / 2, release)
    timer.start()
    assert probe._locks("", str(lock.parents[1])) == {}
    timer.join()

"""A run folder has one live owner; a dead one is replaced; nobody hangs when rank 0 cannot have it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsft.dist import Groups
from dsft.errors import LaunchError, SaveError
from dsft.launch import owner
from dsft.launch.owner import LOCK_NAME, read_run_state, take_run_folder
from tests.support.alone import ALONE
from tests.support.hosts import LOCAL_DIR, playing_host
from tests.support.ranks import run_ranks


def fork_owner(folder: Path) -> int:
    """A child process that owns ``folder`` until it is killed; returns once it does."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        take_run_folder(folder, ALONE)
        os.write(writer, b"x")
        signal.pause()
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_live_run_is_refused_and_a_dead_one_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "runs" / "a"
    child = fork_owner(folder)
    with pytest.raises(LaunchError, match=f"another live run: process {child} on {socket.gethostname()}") as caught:
        take_run_folder(folder, ALONE)
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 2
    kill(child)
    with caplog.at_level(logging.WARNING, logger="dsft"):
        mine = take_run_folder(folder, ALONE)
    assert f"process {child}" in caplog.text
    assert mine.is_owner
    mine.release()


def test_an_owner_that_is_just_dying_is_waited_for(tmp_path: Path) -> None:
    child = fork_owner(tmp_path)
    timer = threading.Timer(0.5, kill, [child])
    timer.start()
    mine = take_run_folder(tmp_path, ALONE)
    timer.join()
    mine.release()


def test_release_leaves_nothing_to_take_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = take_run_folder(tmp_path, ALONE)
    first.release()
    with caplog.at_level(logging.WARNING, logger="dsft"):
        second = take_run_folder(tmp_path, ALONE)
    assert caplog.text == ""
    assert second.attempt != first.attempt
    assert len(second.attempt) == 32
    second.release()


def no_flock(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize(
    ("changes", "is_live"),
    [
        ({}, True),
        ({"start_time": 1.0}, False),  # the process id was given to another process since
        ({"pid": 2**22 + 1}, False),
        ({"host": "elsewhere"}, True),  # cannot be known without flock: never two owners
    ],
)
def test_without_flock_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_live: bool
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    owner_record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start_time": psutil.Process().create_time(),
        "attempt": "f" * 32,
    }
    (tmp_path / LOCK_NAME).write_text(json.dumps({**owner_record, **changes}))
    if is_live:
        with pytest.raises(LaunchError, match="owned by another live run"):
            take_run_folder(tmp_path, ALONE)
    else:
        take_run_folder(tmp_path, ALONE).release()


def test_a_lock_file_cut_short_by_a_crash_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text('{"host": "a"')
    take_run_folder(tmp_path, ALONE).release()


def take_as_rank(groups: Groups, folder: str) -> tuple[str, bool, dict[str, Any] | None]:
    mine = take_run_folder(Path(folder), groups)
    mine.write_state("running", 7, outcome="so far")
    groups.barrier()
    outcome = mine.attempt, mine.is_owner, read_run_state(Path(folder))
    groups.barrier()
    mine.release()
    return outcome


def test_all_ranks_share_the_attempt_and_rank_0_writes(tmp_path: Path) -> None:
    (first, is_owner, state), (second, other_is_owner, _) = run_ranks(
        take_as_rank, 2, str(tmp_path), timeout_seconds=60
    )
    assert first == second
    assert (is_owner, other_is_owner) == (True, False)
    assert state is not None
    assert (state["status"], state["step"], state["attempt"]) == ("running", 7, first)


def refused(groups: Groups, folder: str) -> str:
    with pytest.raises((LaunchError, SaveError)) as caught:
        take_run_folder(Path(folder), groups)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_every_rank_learns_that_the_folder_is_taken(tmp_path: Path) -> None:
    child = fork_owner(tmp_path)
    try:
        texts = run_ranks(refused, 2, str(tmp_path), timeout_seconds=60)
    finally:
        kill(child)
    assert texts[0] == texts[1]
    assert texts[0].startswith("LaunchError")
    (tmp_path / "file").write_text("")
    texts = run_ranks(refused, 2, str(tmp_path / "file" / "run"), timeout_seconds=60)
    assert texts[0] == texts[1]
    assert texts[0].startswith("SaveError")


def test_state_of_a_folder_without_one(tmp_path: Path) -> None:
    assert read_run_state(tmp_path) is None
    (tmp_path / owner.STATE_NAME).write_text("{")
    assert read_run_state(tmp_path) is None


def take_folder_of_own_host(groups: Groups, folder: Path) -> str:
    owner.SHARED_FOLDER_SECONDS = 0.3
    with playing_host(folder, "ab"[groups.rank]):
        with pytest.raises(LaunchError) as caught:
            take_run_folder(Path(LOCAL_DIR), groups)
        groups.barrier()
        if groups.rank == 0:
            take_run_folder(Path(LOCAL_DIR), ALONE).release()  # the lock was given back
    return str(caught.value)


def test_a_folder_that_the_hosts_do_not_share_is_refused_at_the_start(tmp_path: Path) -> None:
    texts = run_ranks(take_folder_of_own_host, 2, tmp_path)
    assert texts[0] == texts[1]
    assert f"run.dir: {LOCAL_DIR} is not shared: b has another folder of that path, or none" in texts[0]

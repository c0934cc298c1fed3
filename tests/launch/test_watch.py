"""What a rank's watch does, in a process of its own: stop requests, heartbeats, stacks, and the end at a deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dsft.launch import heartbeat, watch
from dsft.launch.ancestors import Ancestor, Launcher
from dsft.launch.heartbeat import Beat, Heartbeat, limit_seconds, read_beats, read_stack
from dsft.launch.owner import STATE_NAME, read_run_state, take_run_folder, wait_until_free
from dsft.launch.progress import Progress
from dsft.launch.stop import StopFlag
from dsft.launch.vigil import Vigil
from dsft.launch.watch import STOP_FILE_NAME, Watch, ask_to_stop, declare_ended
from tests.support.alone import ALONE

LIMIT_SECONDS = 60.0
NOBODY = Launcher([])


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def child(run_dir: Path | None, body: Callable[[StopFlag, Progress], int], launcher: Launcher = NOBODY) -> int:
    """Run ``body`` under a watch in a new process; its id. What ``body`` returns is the exit code."""
    pid = os.fork()
    if pid:
        return pid
    try:
        stop, progress = StopFlag(), Progress()
        with stop, Watch(stop, progress, launcher, rank=3, max_seconds=None) as watch:
            if run_dir is not None:
                watch.take(take_run_folder(run_dir, ALONE))
            code = body(stop, progress)
        os._exit(code)
    finally:
        os._exit(99)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for_stop(stop: StopFlag, progress: Progress) -> int:
    until(lambda: stop.requested)
    left = stop.seconds_left()
    sys.stdout.write(f"{stop.requested}|{left}")
    sys.stdout.flush()
    return 7 if left is None else 8


@pytest.mark.parametrize(("seconds", "code"), [(None, 7), (20.0, 8)])
def test_a_stop_file_asks_and_an_old_one_does_not(tmp_path: Path, seconds: float | None, code: int) -> None:
    ask_to_stop(tmp_path, None)
    pid = child(tmp_path, wait_for_stop)
    until(lambda: not (tmp_path / STOP_FILE_NAME).exists())  # what an earlier run had left
    until(lambda: read_beats(tmp_path))
    ask_to_stop(tmp_path, seconds)
    assert exit_code(pid) == code
    assert not (tmp_path / STOP_FILE_NAME).exists()


def test_a_start_that_was_given_up_ends_at_once_and_another_one_does_not(tmp_path: Path) -> None:
    declare_ended(tmp_path, "an older attempt")
    pid = child(tmp_path, wait_for_stop)
    until(lambda: any(beat.number > 2 for beat in read_beats(tmp_path).values()))
    assert not wait_until_free(tmp_path, 0.5), "a rank owns the folder"
    (beat,) = read_beats(tmp_path).values()
    declare_ended(tmp_path, beat.attempt)
    assert exit_code(pid) == 75
    assert wait_until_free(tmp_path, 0.5)


def test_the_death_of_the_launcher_asks_with_a_deadline(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "300"]) as sleeping:
        launcher = Launcher([Ancestor(psutil.Process(sleeping.pid), ("mpirun", "-np", "2"))])
        pid = child(tmp_path, wait_for_stop, launcher)
        until(lambda: read_beats(tmp_path))
        sleeping.kill()
        assert exit_code(pid) == 8


def test_a_rank_that_cannot_stop_ends_at_its_deadline_and_says_what_stands(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / STATE_NAME).write_text(json.dumps({"checkpoint": "step-40", "checkpoint_step": 40}))

    def never_stops(stop: StopFlag, progress: Progress) -> int:
        progress.begin("step", 47)
        while True:
            time.sleep(1.0)

    pid = child(tmp_path, never_stops)
    until(lambda: read_beats(tmp_path))
    ask_to_stop(tmp_path, 1.0)
    assert exit_code(pid) == 75
    said = capfd.readouterr().err
    assert "the time is up in phase step after step 47; the checkpoint of step 40 stands" in said
    state = read_run_state(tmp_path)
    assert state is not None
    assert (state["status"], state["outcome"], state["exit_code"]) == ("stopped", "out_of_time", 75)
    assert (state["host"], state["pid"]) == (os.uname().nodename, pid)


def test_before_the_run_has_its_folder_there_is_nothing_to_wait_for(capfd: pytest.CaptureFixture[str]) -> None:
    pid = child(None, lambda stop, progress: time.sleep(LIMIT_SECONDS) or 1)  # type: ignore[func-returns-value]
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    assert exit_code(pid) == 75
    assert "stop requested (SIGTERM) before the run began" in capfd.readouterr().err


def test_max_seconds_leaves_time_for_two_steps_the_save_in_flight_and_one_more(tmp_path: Path) -> None:
    folder, stop, progress = take_run_folder(tmp_path, ALONE), StopFlag(), Progress()
    progress.save_seconds = 500.0
    with Watch(stop, progress, NOBODY, rank=0, max_seconds=900.0) as watch:
        watch.take(folder)
        until(lambda: stop.requested)
    assert stop.requested == "--max-seconds"
    assert stop.deadline is None  # nobody kills the run at that time: a save that takes longer may end
    folder.release()


@pytest.mark.parametrize("is_saving", [False, True])
def test_time_that_is_enough_for_one_save_is_short_while_another_is_in_flight(
    tmp_path: Path, is_saving: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder, stop, progress = take_run_folder(tmp_path, ALONE), StopFlag(), Progress()
    progress.save_seconds, progress.is_saving = 600.0, is_saving
    progress.begin("step", 1)
    with Watch(stop, progress, NOBODY, rank=0, max_seconds=None) as watch:
        watch.take(folder)
        stop.request("SIGTERM", 1000.0)
        until(lambda: len(read_beats(tmp_path)) and read_beats(tmp_path)[0].number >= 2)  # it has looked
    folder.release()
    said = [record.getMessage() for record in caplog.records if "without saving" in record.getMessage()]
    assert len(said) == is_saving
    assert all("two steps, the save in flight and a save take about 1200 s" in text for text in said)


def test_a_stopped_process_is_found_and_named_with_its_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsft.launch.vigil.SILENT_SECONDS", 3.0)
    vigil = Vigil(tmp_path)

    def a_name_to_find(stop: StopFlag, progress: Progress) -> int:
        progress.begin("step", 12)
        while True:
            time.sleep(1.0)

    pid = child(tmp_path, a_name_to_find)
    until(lambda: any(beat.phase == "step" for beat in vigil.beats().values()))
    assert vigil.hung() == []
    os.kill(pid, signal.SIGSTOP)
    until(vigil.hung)
    (text,) = vigil.stacks(vigil.hung())
    assert f"rank 3 on {os.uname().nodename} (process {pid}) hangs in phase step after step 12: no sign of life" in text
    assert "a_name_to_find" in text
    assert Vigil(tmp_path).beats() == {}, "heartbeats of an older start do not count"
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -9
    assert vigil.hung() == [], "a dead process does not hang"


def test_a_rank_that_stands_still_writes_its_stack_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_FIRST_STEPS_LIMIT_SECONDS", 1.5)
    vigil = Vigil(tmp_path)

    def a_name_to_find(stop: StopFlag, progress: Progress) -> int:
        progress.begin("step", 5)
        while True:
            time.sleep(1.0)

    pid = child(tmp_path, a_name_to_find)
    until(vigil.hung)
    (hang,) = vigil.hung()
    assert "s are the limit there" in hang.reason
    until(lambda: "a_name_to_find" in read_stack(tmp_path, 3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_of_ranks_that_stand_still_the_one_that_is_behind_is_named(tmp_path: Path) -> None:
    vigil = Vigil(tmp_path)
    (tmp_path / heartbeat.FOLDER_NAME).mkdir()
    for rank, step in enumerate((9, 8, 9)):
        beat = Beat(rank, "elsewhere", 1, 0.0, "a", 1, "step", step, 30.0, 31.0)
        record = {name: getattr(beat, name) for name in Beat.__slots__}
        (tmp_path / heartbeat.FOLDER_NAME / f"rank-{rank:05d}").write_text(json.dumps(record))
    assert [hang.beat.rank for hang in vigil.hung()] == [1]


def test_limits_follow_the_phase_and_the_median_step() -> None:
    progress = Progress()
    assert limit_seconds(progress) is None, "the start may prepare data for hours"
    progress.begin("step", 0)
    assert limit_seconds(progress) == 900.0, "the first step compiles"
    for step, seconds in enumerate((300.0, 20.0, 10.0, 20.0)):
        progress.since -= seconds
        progress.begin("step", step)
    assert limit_seconds(progress) == pytest.approx(100.0, abs=1.0)
    since = progress.since
    with progress.meanwhile("save"):
        assert limit_seconds(progress) == 1800.0
        time.sleep(0.1)
    assert progress.phase == "step"
    assert progress.since - since >= 0.1, "a step does not get longer by a wait for its save"
    progress.begin("save", 4)
    assert limit_seconds(progress) == 1800.0
    assert watch.standing(None).startswith("there is no checkpoint")


def test_a_rank_that_waits_for_data_does_not_hang_however_long(tmp_path: Path) -> None:
    folder, progress = take_run_folder(tmp_path, ALONE), Progress()
    heartbeat = Heartbeat(tmp_path, 0, folder.attempt)
    heartbeat.open()
    progress.begin("step", 1)
    progress.since -= 10_000.0

    def stands_still() -> bool:
        heartbeat.beat(progress)
        return read_beats(tmp_path)[0].stands_still

    assert stands_still()
    with progress.waiting_for_data():
        assert not stands_still()
    assert not stands_still(), "its time begins when the data are there"
    progress.data_since -= 10_000.0
    assert stands_still()
    heartbeat.close()
    folder.release()

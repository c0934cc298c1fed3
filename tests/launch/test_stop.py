"""Requests only raise the flag; SIGTERM sets a deadline; the second Ctrl-C gets out; late signals change nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from dsft.launch.stop import STOP_GRACE_SECONDS, StopFlag

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        assert (stop.deadline is not None) == (number == signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == number.name  # the first one is what is reported
        left = stop.seconds_left()
        assert left is not None
        assert 0 < left <= STOP_GRACE_SECONDS


def test_a_late_signal_does_not_kill_a_process_that_has_stopped() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested == "SIGTERM"
    for number in SIGNALS:
        os.kill(os.getpid(), number)  # as launchers do that send it again while Python ends


def test_a_launcher_that_repeats_its_signal_does_not_change_the_exit_code() -> None:
    """Python puts signals with handlers of its own back to their defaults while it ends."""
    script = (
        "import sys, time; from dsft.launch.stop import StopFlag\n"
        "with StopFlag() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while stop.requested is None: time.sleep(0.01)\n"
        "big = [[i] for i in range(3_000_000)]\n"  # so that the end takes a while
        "sys.exit(75)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
    assert process.returncode == 75


def test_without_a_request_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopFlag():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_earliest_deadline_counts() -> None:
    stop = StopFlag()
    stop.request("a", 100.0)
    stop.request("b", 5.0)
    stop.request("c", 50.0)
    left = stop.seconds_left()
    assert left is not None
    assert left <= 5.0
    assert stop.requested == "a"


def test_the_second_interrupt_raises() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"

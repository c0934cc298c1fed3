"""Runs the training command and watches the memory of everything that was started."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

import psutil


class PeakMemory:
    """Context: samples the resident memory of this process and all below it, twice a second.

    Pages that several processes share count once for each, so the figure is an upper bound of what is really used.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(0.5):
            self.peak_bytes = max(self.peak_bytes, tree_bytes())


def tree_bytes() -> int:
    """Resident bytes of this process and its descendants now."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended between the listing and the question
            total += process.memory_info().rss
    return total


def deepspeed_command(arguments: Sequence[str], num_ranks: int) -> list[str]:
    """``deepspeed --num_gpus N --module dsft …`` with this Python and a free port (29500 is fixed unless given)."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*launcher, "--num_gpus", str(num_ranks), "--master_port", str(free_port()), "--module", "dsft", *arguments]


def launch_environment(num_gpus: int, num_threads: int) -> dict[str, str]:
    """This environment; without a GPU DeepSpeed is told so, and each rank computes with ``num_threads``."""
    environment = dict(os.environ)
    if num_gpus == 0:
        environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(num_threads))
    return environment


def run_streaming(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run ``command`` with its output on ours and return its exit code; whatever ends the wait ends its processes.

    (The ``deepspeed`` launcher does not end its ranks when it is ended itself.)
    """
    process = subprocess.Popen(command, env=environment)
    descendants: list[psutil.Process] = []
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=1.0)
            with contextlib.suppress(psutil.NoSuchProcess):
                descendants = psutil.Process(process.pid).children(recursive=True)
    finally:
        end_processes([*descendants, psutil.Process(process.pid)] if process.poll() is None else descendants)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def end_processes(processes: Sequence[psutil.Process], *, at_once: bool = False) -> None:
    """End ``processes`` and wait for it: by SIGTERM and, five seconds later or ``at_once``, by SIGKILL."""
    alive = list(processes)
    if not at_once:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(alive, timeout=5.0)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5.0)

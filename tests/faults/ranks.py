"""Ranks to be killed: the real command line in processes that start in no time, or under the real launcher.

The quick ones are forked from a server that has imported torch and DeepSpeed already; from there on they are ordinary
ranks, each told its place by the usual variables.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.faults import crash_points
from tests.support.launch import launched
from tests.support.ranks import REPOSITORY, free_port

PRELOAD = ["torch", "deepspeed", "transformers.models.llama.modeling_llama", "dsft.train.start", "dsft.cli.train"]


class Ranks:
    """The processes of one start of a run.

    Attributes:
        launcher: the processes above the ranks, topmost first; none for quick ranks.
        quick: the ranks, where nothing is above them.
    """

    def __init__(self, launcher: Sequence[psutil.Process], quick: Sequence[BaseProcess] = ()) -> None:
        self.launcher = list(launcher)
        self.quick = quick
        self._seen: dict[int, psutil.Process] = {}

    def alive(self) -> list[psutil.Process]:
        """Ranks that live, in the order of their numbers (that of their process ids)."""
        for process in self.quick:
            if process.is_alive() and process.pid is not None and process.pid not in self._seen:
                self._seen[process.pid] = psutil.Process(process.pid)
        for above in list(self.launcher):
            try:
                for child in above.children(recursive=True):
                    is_launcher = any("deepspeed.launcher" in word for word in child.cmdline())
                    if is_launcher and child not in self.launcher:
                        self.launcher.append(child)
                    elif not is_launcher and "tests.faults.rank" in child.cmdline():
                        self._seen[child.pid] = child
            except psutil.Error:
                continue
        return [process for pid, process in sorted(self._seen.items()) if _lives(process)]

    def launchers_alive(self) -> list[psutil.Process]:
        """Runner and node launcher, as far as they live."""
        return [process for process in self.launcher if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@contextmanager
def quick_ranks(arguments: Sequence[str], num_ranks: int, log: Path, environ: Mapping[str, str]) -> Iterator[Ranks]:
    """Start ``dsft ARGUMENTS`` on ``num_ranks`` ranks; none of them is left at the end of the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    place = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port()), **environ}
    processes = [
        context.Process(
            target=_rank, args=(list(arguments), str(log), {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks([], processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
        _free_shared_memory(place["MASTER_PORT"])


def _rank(arguments: list[str], log: str, environ: dict[str, str]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan when the storm itself is killed
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environ)
    crash_points.install()
    from dsft.cli.main import run

    sys.exit(run(arguments))


@contextmanager
def launched_ranks(arguments: Sequence[str], num_ranks: int, log: Path, environ: Mapping[str, str]) -> Iterator[Ranks]:
    """As :func:`quick_ranks`, under ``deepspeed``."""
    port = str(free_port())
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", port]
    command += ["--module", "tests.faults.rank", *arguments]
    with launched(command, log, {"PYTHONPATH": str(REPOSITORY), **environ}) as process:
        yield Ranks([psutil.Process(process.pid)])
    _free_shared_memory(port)


def _free_shared_memory(port: str) -> None:
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink(missing_ok=True)

"""Starts a program under a real launcher, and leaves nothing of it running."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

_MARK = "DSFT_TEST_LAUNCH"
_RANK_VARIABLES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"),
}
_RANK_PREFIXES = ("SLURM_", "OMPI_", "PMIX_", "PMI_", "TORCHELASTIC_")


def need(*programs: str) -> None:
    """Skip the test where a program is missing; under CI, which installs them all, fail."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        assert not os.environ.get("CI"), f"not installed: {missing}"
        pytest.skip(f"not installed: {missing}")


@contextmanager
def launched(command: Sequence[str], log: Path, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start ``command`` on the CPU with its output in ``log``; at the end of the block every process of it is killed.

    Launchers put ranks into sessions of their own and leave orphans, so the processes are found by a variable that all
    of them inherit, and killed by id.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }
    mark = uuid.uuid4().hex
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            env={**inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environ, _MARK: mark},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        while marked := list(_marked(mark)):
            for one in marked:
                one.kill()
            psutil.wait_procs(marked, timeout=5)
        process.wait()


def exit_code(command: Sequence[str], log: Path, environ: Mapping[str, str], timeout_seconds: float) -> int:
    """Run ``command`` to its end (see :func:`launched`)."""
    with launched(command, log, environ) as process:
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{list(command)} hangs; its output:\n{log.read_text()}")


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                yield process
        except psutil.Error:
            continue  # ended meanwhile, or another user's

"""Ranks as hosts with a disk each: the same path leads every process to the folder of the host it plays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from unittest import mock

LOCAL_DIR = "/proc/self/cwd/disk"
"""Seen from a process, a folder in its working directory."""


@contextmanager
def playing_host(folder: Path, name: str) -> Iterator[None]:
    """This process is on the host ``name``, whose disk is in ``folder``; it is empty when it is new."""
    host = folder / f"host-{name}"
    (host / "disk").mkdir(parents=True, exist_ok=True)
    with chdir(host), mock.patch("socket.gethostname", return_value=name):
        yield


def shards_on(folder: Path, name: str) -> dict[str, list[str]]:
    """What the disk of a host has of the one run that used it: the files of each step."""
    return {
        step.name.partition(".")[0]: sorted(file.name for file in step.iterdir())
        for run in (folder / f"host-{name}" / "disk").iterdir()
        for step in run.iterdir()
    }

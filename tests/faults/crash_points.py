"""Kills this process at a named point of a save, without a line of library code that knows of it.

Python announces each file it opens, renames or removes to audit hooks. A point's name is the event and what it is
about, with steps, attempts and process ids left out: ``os.rename .step-#.A.tmp``. So the list of points is recorded
from a run, not written by hand, and covers what a save does, whatever format it writes.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

CRASH_AT = "DSFT_TEST_CRASH_AT"
"""``rank|occurrence|name``: that rank kills itself the so-many-th time it comes to that point."""
RECORD_TO = "DSFT_TEST_RECORD_TO"
"""A folder: each rank writes the points it comes by into ``rank-N``, one a line."""
_EVENTS = frozenset(("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"))
_FOLDER = "/checkpoints/"


def install() -> None:
    """Do what the variables of this process ask for."""
    rank = os.environ.get("RANK", "0")
    if folder := os.environ.get(RECORD_TO):
        descriptor = os.open(Path(folder, f"rank-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(lambda event, arguments: _record(descriptor, event, arguments))
    if wanted := os.environ.get(CRASH_AT):
        at_rank, occurrence, name = wanted.split("|", 2)
        if at_rank == rank:
            sys.addaudithook(_Bomb(name, int(occurrence)))


class _Bomb:
    def __init__(self, name: str, occurrence: int) -> None:
        self._name, self._left = name, occurrence

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if _name(event, arguments) == self._name:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _record(descriptor: int, event: str, arguments: tuple[Any, ...]) -> None:
    name = _name(event, arguments)
    if name is not None:
        os.write(descriptor, f"{name}\n".encode())


def _name(event: str, arguments: tuple[Any, ...]) -> str | None:
    if event not in _EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
        return None
    path = os.fsdecode(arguments[0])
    if _FOLDER not in path and not path.endswith(_FOLDER.rstrip("/")):
        return None
    short = re.sub(r"[0-9a-f]{32}", "A", path.partition(_FOLDER)[2] or ".")
    short = re.sub(r"\.tmp\.\d+\.|\d+(?=\.tmp$)", "P", short) if short.startswith(".latest") else short
    kind = event
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = any(letter in (mode or "") for letter in "wxa+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
        kind = "write" if writes else "read"
    return f"{kind} {re.sub(r'[0-9]+', '#', short)}"

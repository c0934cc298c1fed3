"""A user's Python checker of answers, in a process of its own, with a time limit for each answer.

The file defines ``check(prompt: str, answer: str, reference: str) -> bool``. It runs the user's code, and what the
model wrote if that code executes it: the process limits time, it is no sandbox.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from dsft.errors import DataError
from dsft.evaluate.stopping import end_if_asked

if TYPE_CHECKING:
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag

ANSWERS_PER_ROUND = 4
START_SECONDS = 60.0
"""For the interpreter to start and the checker's own imports."""

_CHILD = """\
import json, os, runpy, sys
replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what the checker prints is not a reply
check = runpy.run_path(sys.argv[1]).get("check")
replies.write(json.dumps({"ready": callable(check)}) + "\\n")
for line in sys.stdin:
    try:
        reply = {"passed": bool(check(**json.loads(line)))}
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    replies.write(json.dumps(reply) + "\\n")
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checker said of one answer.

    Attributes:
        outcome: ``passed``, ``failed`` (it returned False), ``raised``, or ``timed_out`` (its process was ended).
        message: of the exception, or of the process that died; empty otherwise.
    """

    outcome: Literal["passed", "failed", "raised", "timed_out"]
    message: str = ""


class Checker:
    """The process, started when first needed and again after each answer that it did not survive.

    Args:
        path: the user's file.
        limit_seconds: for one answer.
    """

    def __init__(self, path: Path, limit_seconds: float) -> None:
        check_path(path)
        self._path, self._limit_seconds = path, limit_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end()

    def check(self, prompt: str, answer: str, reference: str) -> Verdict:
        """Ask about one answer.

        Raises:
            DataError: the file cannot be run at all, or has no ``check``.
        """
        process = self._start()
        assert process.stdin is not None
        question = json.dumps({"prompt": prompt, "answer": answer, "reference": reference})
        try:
            process.stdin.write(question.encode() + b"\n")
            process.stdin.flush()
            reply = self._reply(process, self._limit_seconds)
        except (BrokenPipeError, EOFError):
            self._end()
            return Verdict("raised", f"the checker's process ended (exit code {process.returncode})")
        if reply is None:
            self._end()
            return Verdict("timed_out")
        if "error" in reply:
            return Verdict("raised", str(reply["error"]))
        return Verdict("passed" if reply["passed"] else "failed")

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(self._path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,
        )
        self._unread = b""
        try:
            ready = self._reply(self._process, START_SECONDS)
        except EOFError:
            ready = None
        if ready is None or not ready["ready"]:
            self._end()
            raise DataError(
                f"the checker {self._path} cannot be used: it must run as a Python file within {START_SECONDS:.0f} s "
                "and define check(prompt, answer, reference). Run it with python to see its own message."
            )
        return self._process

    def _reply(self, process: subprocess.Popen[bytes], limit_seconds: float) -> dict[str, object] | None:
        """The next line; None after the limit. Raises EOFError where the process ended."""
        assert process.stdout is not None
        deadline = time.monotonic() + limit_seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                read = os.read(process.stdout.fileno(), 65536)
                if not read:
                    process.wait()
                    raise EOFError
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    def _end(self) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError):  # its own session: children that it started end with it
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        self._process = None


def check_path(path: Path) -> None:
    """Raise DataError where there is no such file."""
    if not path.is_file():
        raise DataError(f"the checker {path} is not there (looked from {Path.cwd()}); give the path of a .py file.")


def verdicts(
    path: Path,
    limit_seconds: float,
    triples: Sequence[tuple[str, str, str]],
    groups: Groups,
    stop: StopFlag | None = None,
) -> list[Verdict]:
    """The checker's verdict on each (prompt, answer, reference), on every rank; the answers are dealt over the ranks.

    Ranks meet after every few answers, so that none waits for long however slow the checker is. Collective.

    Raises:
        DataError: the checker cannot be used, or raises on every answer (a mistake of the checker, not of the model).
        StoppedEarly: a rank was asked to stop.
    """
    rank, num_ranks = groups.world.rank, groups.world.size
    found: list[Verdict] = []
    with Checker(path, limit_seconds) as checker:
        for first in range(0, len(triples), num_ranks * ANSWERS_PER_ROUND):
            end_if_asked(stop, groups)
            of_round = triples[first : first + num_ranks * ANSWERS_PER_ROUND]
            with groups.together():
                mine = [asdict(checker.check(*triple)) for triple in of_round[rank::num_ranks]]
            parts = groups.all_gather_object(mine)
            found += [Verdict(**parts[i % num_ranks][i // num_ranks]) for i in range(len(of_round))]
    raised = [verdict for verdict in found if verdict.outcome == "raised"]
    if found and len(raised) == len(found):
        raise DataError(f"the checker {path} raised on every one of {len(found)} answers; first: {raised[0].message}")
    return found

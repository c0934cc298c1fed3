"""A user's checker: its verdicts, and that nothing it does can stop or stall an evaluation."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from dsft.errors import DataError
from dsft.evaluate.checker import Checker, verdicts

CHECKER = """\
import os, subprocess, sys, time
print("what a checker prints is not its verdict")
def check(prompt, answer, reference):
    print("nor this")
    if answer == "hang":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # orphan of the checker"])
        time.sleep(600)
    if answer == "die":
        os._exit(3)
    if answer == "raise":
        raise ValueError("no number in it")
    return eval(answer) == int(reference)
"""


class _Alone:
    """What ``Groups`` is for one process, without a process group."""

    world = SimpleNamespace(rank=0, size=1)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


ALONE: Any = _Alone()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "checker.py").write_text(CHECKER)
    return tmp_path / "checker.py"


@pytest.mark.timeout(120)
def test_every_answer_gets_a_verdict_whatever_the_checker_does(file: Path) -> None:
    answers = ["2 + 2", "5", "raise", "hang", "die", "4\n", "2 * 2"]
    started = time.monotonic()
    found = verdicts(file, 5.0, [("What is 2 + 2?", answer, "4") for answer in answers], ALONE)
    outcomes = [verdict.outcome for verdict in found]
    assert outcomes == ["passed", "failed", "raised", "timed_out", "raised", "passed", "passed"]
    assert found[2].message == "ValueError: no number in it"
    assert "exit code 3" in found[4].message
    assert time.monotonic() - started < 60
    assert not [p for p in psutil.process_iter(["cmdline"]) if "orphan of the checker" in str(p.info["cmdline"])]


def test_a_checker_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.py is not there"):
        Checker(tmp_path / "none.py", 1.0)
    for text in ("def verify(prompt, answer, reference): pass", "import nothing_of_that_name", "syntax error"):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(DataError, match=r"bad\.py cannot be used"):
            verdicts(tmp_path / "bad.py", 1.0, [("", "", "")], ALONE)
    (tmp_path / "wrong.py").write_text("def check(prompt, answer, reference): return answer.nothing")
    with pytest.raises(DataError, match=r"raised on every one of 2 answers.*nothing"):
        verdicts(tmp_path / "wrong.py", 1.0, [("", "", ""), ("", "", "")], ALONE)

"""The logs of ranks: kept, followed, filtered, and whose error was the first."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsft.cli.main import cli
from dsft.errors import DataError, RankLostError
from dsft.launch.rank_log import LogReader, RankLog, first_error

logger = logging.getLogger("dsft.somewhere")


def say(run_dir: Path, rank: int, *lines: str, error: BaseException | None = None) -> None:
    log = RankLog(run_dir, rank, "attempt")
    log.open()
    for line in lines:
        logger.warning("%s", line)
    if error is not None:
        try:
            raise error
        except type(error) as caught:
            log.write_error(caught)
    log.close()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("dsft").propagate = False


def test_the_first_error_is_that_of_the_rank_which_did_not_only_lose_another(tmp_path: Path) -> None:
    say(tmp_path, 0, error=RankLostError("another rank is gone"))
    say(tmp_path, 2, error=ValueError("no such layer"))
    say(tmp_path, 1, error=DataError("x.jsonl:3 is damaged"))
    for rank, second in ((0, 1), (1, 2), (2, 3)):
        os.utime(tmp_path / "logs" / f"rank-{rank:05d}.error", (second, second))
    found = first_error(tmp_path, "attempt")
    assert found is not None
    assert (found.rank, found.text) == (1, "x.jsonl:3 is damaged")
    assert found.describe().endswith("failed first: x.jsonl:3 is damaged")
    assert first_error(tmp_path, "another attempt") is None
    say(tmp_path, 1)  # a new start of it
    found = first_error(tmp_path, "attempt")
    assert found is not None
    assert found.text == "ValueError: no such layer"


def test_logs_are_shown_in_the_order_of_time_filtered_and_followed(tmp_path: Path) -> None:
    say(tmp_path, 1, "one")
    time.sleep(0.01)  # of one millisecond, the lower rank is first
    say(tmp_path, 0, "two", error=ValueError("three"))
    reader = LogReader(tmp_path, frozenset(), "info")
    first = list(reader.new_lines())
    assert [(rank, line.split(" ", 3)[-1]) for rank, line in first[:2]] == [(1, "one"), (0, "two")]
    assert first[-1] == (0, "ValueError: three"), "the end of the traceback"
    with open(tmp_path / "logs" / "rank-00001.log", "a") as file:
        file.write("2030-01-01 00:00:00,000 INFO half")
    assert list(reader.new_lines()) == []
    with open(tmp_path / "logs" / "rank-00001.log", "a") as file:
        file.write(" a line\n")
    assert list(reader.new_lines()) == [(1, "2030-01-01 00:00:00,000 INFO half a line")]

    shown = CliRunner().invoke(cli, ["logs", str(tmp_path), "--level", "error"])
    assert "ValueError: three" in shown.output
    assert "two" not in shown.output
    shown = CliRunner().invoke(cli, ["logs", str(tmp_path), "--rank", "1"])
    assert shown.output.startswith("[1] ")
    assert "[0]" not in shown.output

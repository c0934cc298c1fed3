"""The control group: gathers, sums and agreement over real gloo ranks."""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from contextlib import suppress

import numpy as np
import pytest

from dsft.dist import (
    OTHER_OPEN_FILES,
    SAY_AFTER_SECONDS,
    SOCKETS_PER_RANK,
    Groups,
    allow_sockets,
    from_bits,
    to_bits,
)
from dsft.errors import DataError, LaunchError, SaveError, TrainingError
from dsft.world import World
from tests.support.ranks import RankError, run_ranks


def gather_everything(groups: Groups) -> dict[str, object]:
    first = groups.post(np.array([groups.rank, -1], dtype=np.int64))
    second = groups.post(np.array([groups.rank * 10], dtype=np.int64))  # two on their way at once
    total = groups.sum(np.array([0.1 * (groups.rank + 1), 1e16 if groups.rank == 0 else 1.0]))
    return {
        "second": second.wait().tolist(),
        "first": first.wait().tolist(),
        "sum": [float(value).hex() for value in total],
        "objects": groups.all_gather_object({"rank": groups.rank, "text": "ü" * groups.rank * 100}),
        "broadcast": groups.broadcast_object([groups.rank, "from zero"]),
        "pid": os.getpid(),
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_gets_the_same(num_ranks: int) -> None:
    results = run_ranks(gather_everything, num_ranks, timeout_seconds=60)
    for result in results:
        assert result["first"] == [[rank, -1] for rank in range(num_ranks)]
        assert result["second"] == [[rank * 10] for rank in range(num_ranks)]
        assert result["objects"] == [{"rank": rank, "text": "ü" * rank * 100} for rank in range(num_ranks)]
        assert result["broadcast"] == [0, "from zero"]
        assert result["sum"] == results[0]["sum"]
    expected = [0.0, 0.0]
    for rank in range(num_ranks):
        expected = [expected[0] + 0.1 * (rank + 1), expected[1] + (1e16 if rank == 0 else 1.0)]
    assert results[0]["sum"] == [value.hex() for value in expected]  # added one after the other, in rank order


def test_no_process_is_used_twice() -> None:
    first, second = ({result["pid"] for result in run_ranks(gather_everything, 2)} for _ in range(2))
    assert len(first | second) == 4


def allow(groups: Groups, soft: int, hard: int, num_ranks: int) -> int:
    """In a process of its own, whose hard limit cannot be raised again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    allow_sockets(World(0, num_ranks, 0, 1, 0, "127.0.0.1", 29500, "environment"))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_limit_of_open_files_is_raised_to_what_connections_take() -> None:
    assert run_ranks(allow, 1, 1024, 4096, 512) == [OTHER_OPEN_FILES + SOCKETS_PER_RANK * 512]
    assert run_ranks(allow, 1, 2048, 4096, 2) == [2048]
    with pytest.raises(LaunchError, match=r"lets a process open 4,096 files, and rank 0 of 4,096 needs up to 17,384"):
        run_ranks(allow, 1, 1024, 4096, 4096)


def fail_on_rank_one(groups: Groups) -> None:
    groups.agree(SaveError("the disk of this host is full") if groups.rank == 1 else None)


def test_one_failure_is_everyones_failure() -> None:
    with pytest.raises(SaveError, match=r"disk of this host is full \(rank 1 on ") as caught:
        run_ranks(fail_on_rank_one, 2, timeout_seconds=60)
    assert "rank 0" in str(caught.value.__cause__)  # both raised it
    assert "rank 1" in str(caught.value.__cause__)


def fail_while_the_other_is_busy(groups: Groups) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dsft.dist").addHandler(handler)
    heard_in_time = False
    try:
        with groups.together():
            if groups.rank == 1:
                raise DataError("a.jsonl:7 is not valid JSON.")
            time.sleep(SAY_AFTER_SECONDS + 1.5)
    except DataError:
        heard_in_time = True
    assert heard_in_time
    before = len(said)
    with suppress(DataError), groups.together():
        raise DataError("all at once")
    assert len(said) == before, "nobody had to wait"
    logging.getLogger("dsft.dist").removeHandler(handler)
    return said


def test_a_rank_that_failed_says_so_while_the_others_are_busy() -> None:
    busy, failed = run_ranks(fail_while_the_other_is_busy, 2, timeout_seconds=60)
    assert busy == []
    assert failed == ["DataError: a.jsonl:7 is not valid JSON. This rank waits for the others to hear of it."]


def break_on_rank_one(groups: Groups) -> tuple[str, str]:
    try:
        with groups.together():
            if groups.rank == 1:
                raise IndexError("position 1024 of 1024")
    except (IndexError, TrainingError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_an_error_that_dsft_does_not_know_stops_the_others_too() -> None:
    (kind, text), own = run_ranks(break_on_rank_one, 2, timeout_seconds=60)
    assert own == ("IndexError", "position 1024 of 1024")
    assert kind == "TrainingError"
    assert "IndexError: position 1024 of 1024 (rank 1 on " in text


def die_on_rank_one(groups: Groups) -> str:
    if groups.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        groups.barrier()
    except TrainingError as error:
        return str(error)
    return "nothing noticed"


def test_a_dead_rank_is_noticed() -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(die_on_rank_one, 2, timeout_seconds=60)


def sleep_on_rank_one(groups: Groups) -> None:
    if groups.rank == 1:
        time.sleep(600)


def test_a_hanging_rank_is_killed() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 was still running"):
        run_ranks(sleep_on_rank_one, 2, timeout_seconds=4)
    assert time.monotonic() - started < 30


def raise_alone(groups: Groups) -> None:
    if groups.rank == 1:
        raise DataError("line 7")
    groups.barrier()


def test_an_exception_comes_back_as_it_was() -> None:
    with pytest.raises((DataError, TrainingError)) as caught:
        run_ranks(raise_alone, 2, timeout_seconds=60)
    assert "line 7" in str(caught.value.__cause__)


def test_floats_travel_as_bits() -> None:
    values = np.array([0.0, -0.0, 1e-310, np.inf, np.nan, 0.1])
    assert to_bits(values).dtype == np.int64
    assert from_bits(to_bits(values)).tobytes() == values.tobytes()

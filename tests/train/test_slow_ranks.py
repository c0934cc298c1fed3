"""A rank whose computing is slow is named with its host; equal ones are not, and nothing else changes."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsft.model.head
import dsft.train.slow_ranks
from dsft.dist import Groups
from dsft.metrics.recorder import METRICS_NAME
from dsft.train.loop import train
from dsft.train.slow_ranks import COMPARE_STEPS, NUM_IN_ROW, SLOW_FACTOR, SlowRanks, slowness
from tests.support.alone import ALONE
from tests.support.models import VOCAB, tiny_model
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store
from tests.support.training import built_run, read_lines

PACK_TOKENS, NUM_STEPS = 32, 4 * COMPARE_STEPS


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 64])
def test_equal_ranks_are_equal_and_the_slow_one_is_not(num_ranks: int) -> None:
    generator = np.random.default_rng(num_ranks)
    seconds = generator.normal(1e-5, 5e-7, num_ranks).tolist()
    assert max(slowness(seconds)) < SLOW_FACTOR
    seconds[-1] *= 2.0
    assert [factor >= SLOW_FACTOR for factor in slowness(seconds)] == [False] * (num_ranks - 1) + [True]
    assert slowness([None, *seconds])[0] == 1.0
    assert slowness([None, None]) == [1.0, 1.0]


class _WorkClock:
    """Counts the seconds of the head's work alone, so that a busy machine slows no rank."""

    def __init__(self, seconds_a_row: float) -> None:
        self._seconds_a_row, self._now = seconds_a_row, 0.0

    def perf_counter(self) -> float:
        return self._now

    def computing(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """``compute`` of the head, whose rows move the clock on."""

        def timed(hidden: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            self._now += self._seconds_a_row * PACK_TOKENS
            return compute(hidden, *arguments, **more)

        return timed


def _train(groups: Groups, folder: Path) -> int:
    """Rank 1 takes twice as long for the rows of a micro-batch."""
    clock = _WorkClock(1e-5 if groups.rank == 0 else 2e-5)
    compute = dsft.model.head.masked_linear_cross_entropy
    config = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"pack_tokens": PACK_TOKENS, "sources": [{"name": "text", "path": "-"}]},
        "train": {"steps": NUM_STEPS, "global_batch_packs": 2, "lr": 1e-3},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    dsft.model.head.masked_linear_cross_entropy = clock.computing(compute)
    dsft.train.slow_ranks.time = clock  # type: ignore[assignment]
    try:
        with built_run(groups, folder / "run", config, [folder / "text"]) as (run, state, _, _):
            assert train(run, state) == "finished"
            return state.step
    finally:
        dsft.model.head.masked_linear_cross_entropy = compute
        dsft.train.slow_ranks.time = time


@pytest.mark.launch
@pytest.mark.timeout(200)
def test_a_slow_rank_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(3)
    documents = [text_document(generator.integers(3, VOCAB, PACK_TOKENS).tolist()) for _ in range(40)]
    write_store(tmp_path / "text", documents, num_shards=2, name="text", vocab_tokens=VOCAB)
    assert run_ranks(_train, 2, tmp_path, timeout_seconds=180) == [NUM_STEPS, NUM_STEPS]
    warnings = [record["message"] for record in read_lines(tmp_path / "run" / METRICS_NAME, "warning")]
    (said,) = [text for text in warnings if text.startswith("slow rank")]
    assert f"at step {NUM_IN_ROW * COMPARE_STEPS}, rank 1 on {socket.gethostname()} computes 2.0 times " in said


class _Told:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def test_one_pause_is_not_said_and_a_slow_rank_is_said_once_until_it_recovers() -> None:
    told: Any = _Told()
    ranks = SlowRanks(ALONE, torch.nn.Linear(1, 1), torch.device("cpu"), told)
    pause = [(9.0, 0), (1.0, 0)]
    slow_twice = [(9.0, 0), (9.0, 0), (9.0, 1), (9.0, 1), (1.0, 1), (2.0, 1), (2.0, 1), (2.0, 2)]
    for factor, said in pause + slow_twice:
        ranks.note(10, 0, factor)
        assert len(told.messages) == said

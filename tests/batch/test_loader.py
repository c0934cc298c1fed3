from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dsft.batch.collate import BatchSpec
from dsft.batch.loader import Loader
from dsft.batch.types import StepBatch
from dsft.errors import DataError
from dsft.ops import backend
from dsft.sampling.balance import pack_costs
from dsft.sampling.plan import Planner
from dsft.sampling.types import Cursor, PlannedSource, Stage
from dsft.store.reader import SourceStore
from tests.support.restore import assert_restores_at_every_step
from tests.support.stores import two_stores

COSTS = partial(pack_costs, a=1.0, b=0.01)


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    backend.choose("native")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceStore, ...]:
    return two_stores(tmp_path_factory.mktemp("stores"), num_shards=4)


def make_planner(stores: tuple[SourceStore, ...], train_tokens: int = 8000) -> Planner:
    def lengths(store: SourceStore, shard: int) -> npt.NDArray[np.int32]:
        return store.index(shard).lengths

    return Planner(
        [
            PlannedSource(store.name, store.num_shards, partial(lengths, store), will_need=store.files.will_need)
            for store in stores
        ],
        (Stage("one", 3000, (0.7, 0.3)), Stage("two", None, (0.2, 0.8))),
        seed=5,
        pack_tokens=64,
        global_batch_packs=7,
        window_documents=50,
        window_tokens=10**6,
        group_shards=2,
        overlong="split",
        train_tokens=train_tokens,
    )


def make_loader(
    stores: tuple[SourceStore, ...],
    *,
    rank: int = 0,
    num_ranks: int = 1,
    micro_batch_packs: int = 1,
    prefetch_steps: int = 2,
    planner: Planner | None = None,
) -> Loader:
    return Loader(
        planner or make_planner(stores),
        BatchSpec(stores, (1.0, 0.5), "token", 64, 999),
        rank=rank,
        num_ranks=num_ranks,
        micro_batch_packs=micro_batch_packs,
        costs=COSTS,
        prefetch_steps=prefetch_steps,
    )


def content(step: StepBatch) -> list[object]:
    batches = [
        (b.input_ids.tolist(), b.cu_seqlens.tolist(), b.rows.tolist(), b.row_weight.tolist(), b.data_hash, b.is_filler)
        for b in step.micro_batches
    ]
    return [step.plan.plan_hash, step.plan.cursor_after, *batches]


def read(loader: Loader, cursor: Cursor) -> list[StepBatch]:
    steps = list(loader.steps(cursor))
    loader.close()
    return steps


def pieces_of(steps: list[StepBatch]) -> list[tuple[int, ...]]:
    rows = []
    for step in steps:
        for batch in step.micro_batches:
            columns = (
                getattr(batch.pieces, name).tolist() for name in ("source", "shard", "document", "start", "epoch")
            )
            rows += list(zip(*columns, strict=True))
    return rows


@pytest.mark.parametrize("micro_batch_packs", [1, 2])
def test_all_world_sizes_train_the_same_pieces_in_the_same_steps(
    stores: tuple[SourceStore, ...], micro_batch_packs: int
) -> None:
    cursor = make_planner(stores).start()
    seen = {}
    for num_ranks in (1, 2, 3, 5, 7):
        ranks = [
            read(make_loader(stores, rank=rank, num_ranks=num_ranks, micro_batch_packs=micro_batch_packs), cursor)
            for rank in range(num_ranks)
        ]
        summary = []
        for step in zip(*ranks, strict=True):
            assert len({(s.plan.plan_hash, len(s.micro_batches), s.plan.cursor_after) for s in step}) == 1
            fillers = np.array([[b.is_filler for b in s.micro_batches] for s in step])
            assert not fillers[:, :-1].any()
            batches = [b for s in step for b in s.micro_batches]
            summary.append(
                (
                    sorted(pieces_of(list(step))),
                    sum(b.data_hash for b in batches) % 2**63,
                    sum(b.num_tokens for b in batches),
                    sum(b.weight_sum for b in batches),
                )
            )
        seen[num_ranks] = summary
    assert all(summary == seen[1] for summary in seen.values())
    assert sum(step[2] for step in seen[1]) >= 8000


def test_restores_at_every_step(stores: tuple[SourceStore, ...]) -> None:
    def iterate(cursor: Cursor):
        loader = make_loader(stores, rank=1, num_ranks=2)
        try:
            yield from loader.steps(cursor)
        finally:
            loader.close()

    start = make_planner(stores, 4000).start()
    steps = assert_restores_at_every_step(iterate, start, lambda step: step.plan.cursor_after, content)
    assert len(steps) > 10
    assert {step.plan.stage for step in steps} == {0, 1}


def test_the_depth_of_prefetching_changes_nothing(stores: tuple[SourceStore, ...]) -> None:
    cursor = make_planner(stores).start()
    runs = [[content(step) for step in read(make_loader(stores, prefetch_steps=depth), cursor)] for depth in (1, 2, 9)]
    assert runs[0] == runs[1] == runs[2]


class CountingPlanner(Planner):
    """Counts the steps that were planned."""

    planned = 0
    threads: set[str]

    def steps(self, cursor: Cursor):  # type: ignore[no-untyped-def]
        self.threads = set()
        for step in super().steps(cursor):
            self.planned += 1
            self.threads.add(threading.current_thread().name)
            yield step


def test_prefetches_at_once_in_one_thread_and_no_further_than_asked(stores: tuple[SourceStore, ...]) -> None:
    planner = make_planner(stores)
    planner.__class__ = CountingPlanner
    assert isinstance(planner, CountingPlanner)
    loader = make_loader(stores, planner=planner, prefetch_steps=3)
    steps = loader.steps(planner.start())
    deadline = time.monotonic() + 30
    while planner.planned < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert planner.planned == 3
    next(steps)
    time.sleep(0.2)
    assert planner.planned == 4
    loader.close()
    assert planner.threads == {"dsft-loader_0"}
    assert not any(thread.name.startswith("dsft-loader") for thread in threading.enumerate())


def test_an_error_comes_at_its_step_and_the_thread_ends(stores: tuple[SourceStore, ...]) -> None:
    asked: list[int] = []
    missing: list[int] = []

    def lengths(shard: int) -> npt.NDArray[np.int32]:
        asked.append(shard)
        if shard in missing:
            raise DataError("shard is gone")
        return stores[0].index(shard).lengths

    def planner() -> Planner:
        return Planner(
            [PlannedSource("a", 4, lengths)],
            (Stage("s", None, (1.0,)),),
            seed=5,
            pack_tokens=64,
            global_batch_packs=2,
            window_documents=10,
            window_tokens=10**6,
            group_shards=1,
            overlong="split",
            train_tokens=8000,
        )

    cursor = planner().start()
    expected = [step.plan_hash for step in planner().steps(cursor)]
    missing.append(asked[1])  # the second shard of the order
    found: list[int] = []

    def consume() -> None:
        for step in make_loader(stores, planner=planner()).steps(cursor):
            found.append(step.plan.plan_hash)

    with pytest.raises(DataError, match="shard is gone"):
        consume()
    assert 0 < len(found) < len(expected)
    assert found == expected[: len(found)]
    assert not any(thread.name.startswith("dsft-loader") for thread in threading.enumerate())


def test_waiting_is_measured(stores: tuple[SourceStore, ...]) -> None:
    def slow(store: SourceStore, shard: int) -> npt.NDArray[np.int32]:
        time.sleep(0.2)
        return store.index(shard).lengths

    planner = make_planner(stores)
    for order, store in zip(planner._orders, stores, strict=True):
        order.source = PlannedSource(store.name, store.num_shards, partial(slow, store))
    loader = make_loader(stores, planner=planner)
    steps = loader.steps(planner.start())
    next(steps)
    waited = loader.wait_seconds
    assert waited >= 0.6  # two sources, two shards each, in their first groups
    time.sleep(0.5)
    next(steps)
    assert loader.wait_seconds - waited < 0.1
    loader.close()


def test_a_second_iteration_ends_the_first(stores: tuple[SourceStore, ...], tmp_path: Path) -> None:
    loader = make_loader(stores)
    cursor = make_planner(stores).start()
    first = loader.steps(cursor)
    head = content(next(first))
    again = loader.steps(cursor)
    assert content(next(again)) == head
    assert sum(thread.name.startswith("dsft-loader") for thread in threading.enumerate()) == 1
    loader.close()
    loader.close()

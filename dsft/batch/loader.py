"""Plans and collates ahead of training, in one thread.

A thread and not a process: batches need not be sent anywhere, and nothing is forked after a device is initialised.
numpy, the native operations and page faults on memory maps release the interpreter lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from dsft.batch.collate import BatchSpec, collate_rows, filler
from dsft.batch.types import StepBatch
from dsft.ops.buffers import BufferPool
from dsft.sampling.balance import deal
from dsft.sampling.plan import Planner
from dsft.sampling.types import Cursor, Pieces, StepPlan


class Loader:
    """Batches of one rank, step by step.

    Args:
        planner: the plan, equal on all ranks.
        spec: how packs become tensors.
        rank, num_ranks: which packs of a step are this rank's.
        micro_batch_packs: packs in a micro-batch of one rank.
        costs: time of each of some packs in any unit, to balance the ranks.
        prefetch_steps: steps prepared ahead.

    Attributes:
        wait_seconds: time that the consumer has waited for batches so far.
    """

    def __init__(
        self,
        planner: Planner,
        spec: BatchSpec,
        *,
        rank: int,
        num_ranks: int,
        micro_batch_packs: int,
        costs: Callable[[Sequence[Pieces]], list[float]],
        prefetch_steps: int = 2,
    ) -> None:
        self._planner = planner
        self._spec = spec
        self._rank = rank
        self._num_ranks = num_ranks
        self._micro_batch_packs = micro_batch_packs
        self._costs = costs
        self._prefetch_steps = prefetch_steps
        self._buffers = BufferPool()
        self._executor: ThreadPoolExecutor | None = None
        self.wait_seconds = 0.0

    def steps(self, cursor: Cursor) -> Iterator[StepBatch]:
        """Batches from ``cursor`` to the end of training. Ends an earlier iteration of this loader.

        Raises:
            DataError, KernelError, CheckpointError: as they were raised in the thread, at the step they belong to.
        """
        self.close()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dsft-loader")
        produced = self._produce(cursor)  # only the executor's one thread touches it
        waiting = deque(self._executor.submit(next, produced, None) for _ in range(self._prefetch_steps))
        return self._consume(self._executor, produced, waiting)

    def close(self) -> None:
        """Stop preparing and join the thread. Waits for the step that is being prepared."""
        if self._executor is not None:
            self._shut_down(self._executor)
            self._executor = None

    def _consume(
        self,
        executor: ThreadPoolExecutor,
        produced: Iterator[StepBatch],
        waiting: deque[Future[StepBatch | None]],
    ) -> Iterator[StepBatch]:
        try:
            while True:
                begin = time.perf_counter()
                batch = waiting.popleft().result()
                self.wait_seconds += time.perf_counter() - begin
                if batch is None:
                    return
                waiting.append(executor.submit(next, produced, None))
                yield batch
        finally:
            self._shut_down(executor)

    def _shut_down(self, executor: ThreadPoolExecutor) -> None:
        """Its thread may wait for data that nobody will make, because the other ranks have stopped before it."""
        with ExitStack() as stack:
            for store in self._spec.stores:
                stack.enter_context(store.files.without_waiting())
            executor.shutdown(wait=True, cancel_futures=True)

    def _produce(self, cursor: Cursor) -> Iterator[StepBatch]:
        for plan in self._planner.steps(cursor):
            yield self._batch(plan)

    def _batch(self, plan: StepPlan) -> StepBatch:
        dealt = deal(self._costs(plan.packs), self._num_ranks, self._micro_batch_packs)
        hands = [micro_batch[self._rank] for micro_batch in dealt]
        packs = [[plan.packs[number] for number in hand] for hand in hands if hand]
        rows = iter(collate_rows(packs, self._spec, self._buffers))
        return StepBatch(plan, tuple(next(rows) if hand else filler(self._spec) for hand in hands))

"""The control message: every rank takes the same decision, from what all ranks said."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from dsft.batch.types import PackedBatch, StepBatch
from dsft.errors import DataError, StoppedEarly, TrainingError
from dsft.sampling.types import Cursor, Pieces, StepPlan
from dsft.train.control import Agreement, agree, propose

NO_PIECES = Pieces(*(np.zeros(0, dtype=t) for t in (np.int32, np.int32, np.int64, np.int64, np.int32, np.int32)))
PLAN = StepPlan((), Cursor(0, 0, None, 0, 0, (0,), ()), 10, 10, 0, False, plan_hash=12345)


@dataclass
class Table:
    """Stands in for the gloo group: collects what ranks post and gives everyone the table."""

    rows: list[np.ndarray]
    errors: dict[int, Exception]

    def agree(self, error):
        raise next(iter(self.errors.values()))

    def post(self, vector):
        self.rows.append(vector)
        return self

    def wait(self):
        return np.stack(self.rows)


def batch(num_rows: int, weight: float, *, filler: bool = False, padding: int = 3, data_hash: int = 7) -> StepBatch:
    none = torch.zeros(0)
    packed = PackedBatch(
        none, none, none, 8, torch.zeros(num_rows), none, none, NO_PIECES,
        0 if filler else 13, padding, filler, weight, data_hash,
    )  # fmt: skip
    return StepBatch(PLAN, (packed,))


def decide(
    batches: list[StepBatch | None], *, stop=(), salts=None, errors=None, saves=None
) -> list[Agreement | Exception]:
    table = Table([], errors or {})
    proposals = [
        propose(
            table,
            one,
            (errors or {}).get(rank),
            stop=rank in stop,
            num_save_tasks_done=(saves or {}).get(rank, 3),
            salt=(salts or {}).get(rank, 99),
        )
        for rank, one in enumerate(batches)
    ]
    results: list[Agreement | Exception] = []
    for proposal in proposals:
        try:
            results.append(agree(table, proposal))
        except (DataError, TrainingError) as error:
            results.append(error)
    return results


def test_sums_over_ranks_and_kinds_of_tokens() -> None:
    weights = [0.1, 0.2, 0.30000000000000004]
    ranks = decide([batch(5, weights[0]), batch(0, weights[1]), batch(2, weights[2], filler=True, padding=8)])
    assert len(set(ranks)) == 1
    got = ranks[0]
    assert got.weight == pytest.approx(sum(weights), abs=0)
    assert (got.num_supervised, got.num_tokens, got.num_padding, got.num_idle) == (7, 26, 6, 8)
    assert (got.end, got.stop, got.data_hash) == (False, False, 21)


def test_one_rank_asked_to_stop_stops_all() -> None:
    assert all(result.stop for result in decide([batch(1, 1.0), batch(1, 1.0)], stop=(1,)))


def test_a_rank_whose_waiting_for_data_was_ended_stops_all_and_is_not_the_end() -> None:
    stopped = StoppedEarly("stopped on request while it waited")
    for batches in ([None, None], [None, batch(1, 1.0)], [batch(1, 1.0), None]):
        errors = {rank: stopped for rank, one in enumerate(batches) if one is None}
        assert [(result.stop, result.end) for result in decide(batches, errors=errors)] == [(True, False)] * 2


def test_a_save_goes_on_when_the_slowest_rank_has_written() -> None:
    ranks = decide([batch(1, 1.0), batch(1, 1.0), batch(1, 1.0)], saves={0: 8, 1: 7, 2: 8})
    assert [result.num_save_tasks_done for result in ranks] == [7, 7, 7]


def test_the_end_is_seen_by_all() -> None:
    assert all(result.end for result in decide([None, None]))


def test_the_data_hash_wraps_alike_everywhere() -> None:
    big = 2**63 - 2
    ranks = decide([batch(1, 1.0, data_hash=big), batch(1, 1.0, data_hash=5)])
    assert [result.data_hash for result in ranks] == [3, 3]


@pytest.mark.parametrize("other", [1, 0])
def test_ranks_with_another_store_or_plan_stop_before_training(other: int) -> None:
    for result in decide([batch(1, 1.0), batch(1, 1.0)], salts={other: 100}):
        assert isinstance(result, TrainingError)
        assert "plan another step" in str(result)
    plans = [batch(1, 1.0), replace(batch(1, 1.0), plan=replace(PLAN, plan_hash=54321))]
    assert all(isinstance(result, TrainingError) for result in decide(plans))


def test_one_rank_at_the_end_and_one_not_is_a_disagreement() -> None:
    assert all(isinstance(result, TrainingError) for result in decide([batch(1, 1.0), None]))


def test_an_error_on_one_rank_is_raised_on_all_of_them() -> None:
    error = DataError("block 7 of shard 3 is damaged")
    assert decide([batch(1, 1.0), None], errors={1: error}) == [error, error]

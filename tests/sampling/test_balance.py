from __future__ import annotations

import numpy as np
import pytest

from dsft.sampling.balance import deal, pack_costs
from dsft.sampling.packing import best_fit_decreasing
from dsft.sampling.types import Pieces

LLAMA_8B = (6.0 * 8e9, 7.0 * 32 * 4096)
"""Operations per token and per squared document token: 6 N, and 7 per layer and unit of width (causal)."""


def pack_of(lengths: list[int]) -> Pieces:
    column = np.array(lengths, dtype=np.int32)
    zeros = np.zeros(len(lengths), dtype=np.int64)
    return Pieces(zeros.astype(np.int32), zeros.astype(np.int32), zeros, zeros, column, zeros.astype(np.int32))


def lognormal_packs(num_packs: int, pack_tokens: int, mean: int) -> list[Pieces]:
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(mean) - 0.72, 1.2, 30_000), 8, pack_tokens).astype(np.int32)
    packing = best_fit_decreasing(lengths, pack_tokens)
    parts = np.split(lengths[packing.pieces], packing.offsets[1:-1])
    order = rng.permutation(len(parts))[:num_packs]
    return [pack_of(parts[number].tolist()) for number in order]


def test_cost_of_a_pack() -> None:
    packs = [pack_of([3, 4]), pack_of([2**31 - 1]), pack_of([1])]
    assert pack_costs(packs, a=10.0, b=0.5) == [
        10 * 7 + 0.5 * (9 + 16),
        10 * (2**31 - 1) + 0.5 * float(2**31 - 1) ** 2,
        10.5,
    ]
    assert pack_costs([], a=1.0, b=1.0) == []


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("micro_batch_packs", [1, 2, 3])
@pytest.mark.parametrize("num_packs", [1, 4, 16, 23])
def test_every_pack_once_and_fillers_only_at_the_end(num_ranks: int, micro_batch_packs: int, num_packs: int) -> None:
    packs = lognormal_packs(num_packs, 2048, 300)
    dealt = deal(pack_costs(packs, a=1.0, b=1e-3), num_ranks, micro_batch_packs)
    assert len(dealt) == -(-num_packs // (num_ranks * micro_batch_packs))
    assert all(len(micro_batch) == num_ranks for micro_batch in dealt)
    assert all(len(hand) == micro_batch_packs for micro_batch in dealt[:-1] for hand in micro_batch)
    assert all(len(hand) <= micro_batch_packs for hand in dealt[-1])
    assert sorted(number for micro_batch in dealt for hand in micro_batch for number in hand) == list(range(num_packs))


def test_micro_batches_are_alike_across_ranks() -> None:
    """The sum over micro-batches of the slowest rank, over that of the mean: 8 ranks, 16 micro-batches, 32k packs."""
    packs = lognormal_packs(128, 32_768, 2900)
    costs = pack_costs(packs, a=LLAMA_8B[0], b=LLAMA_8B[1])

    def imbalance(dealt: list[list[tuple[int, ...]]]) -> float:
        loads = np.array([[sum(costs[n] for n in hand) for hand in micro_batch] for micro_batch in dealt])
        return float(loads.max(axis=1).sum() / loads.mean(axis=1).sum())

    in_turn = [[(micro_batch * 8 + rank,) for rank in range(8)] for micro_batch in range(16)]
    assert imbalance(deal(costs, 8, 1)) < 1.03 < imbalance(in_turn)
    assert imbalance(deal(costs, 4, 2)) < 1.03


def test_ties_are_dealt_in_order() -> None:
    assert deal([1.0] * 5, 2, 2) == [[(0, 2), (1, 3)], [(4,), ()]]


@pytest.mark.parametrize(("num_ranks", "micro_batch_packs"), [(1, 3), (3, 2), (4, 1), (5, 4)])
def test_each_pack_goes_to_the_rank_with_the_least_cost_that_has_room(num_ranks: int, micro_batch_packs: int) -> None:
    costs = np.random.default_rng(3).integers(1, 9, 61).astype(float).tolist()
    order = sorted(range(len(costs)), key=lambda number: (-costs[number], number))
    for begin, micro_batch in zip(
        range(0, len(order), num_ranks * micro_batch_packs), deal(costs, num_ranks, micro_batch_packs), strict=True
    ):
        hands: list[tuple[int, ...]] = [()] * num_ranks
        for number in order[begin : begin + num_ranks * micro_batch_packs]:
            with_room = [rank for rank in range(num_ranks) if len(hands[rank]) < micro_batch_packs]
            rank = min(with_room, key=lambda one: (sum(costs[n] for n in hands[one]), one))
            hands[rank] = (*hands[rank], number)
        assert micro_batch == hands

"""Deal the packs of one step to micro-batches and ranks.

Under ZeRO-3 every layer of every micro-batch is a barrier: the slowest rank of each micro-batch decides its time. So
packs that run at the same micro-batch index must cost alike; totals per rank do not matter.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from dsft.sampling.types import Pieces


def pack_costs(packs: Sequence[Pieces], a: float, b: float) -> list[float]:
    """``a * tokens + b * sum(length^2)`` of each pack: matrix products go by tokens, causal attention by pairs of them.

    Args:
        packs: none of them empty.
        a, b: time (or operations) per token, and per squared token of a document.
    """
    sizes = [len(pack.length) for pack in packs]
    assert all(sizes), "a pack has at least one piece"
    if not sizes:
        return []
    lengths = np.concatenate([pack.length for pack in packs]).astype(np.float64)
    begins = np.cumsum([0, *sizes[:-1]])
    costs = a * np.add.reduceat(lengths, begins) + b * np.add.reduceat(lengths * lengths, begins)
    return [float(cost) for cost in costs.tolist()]


def deal(costs: Sequence[float], num_ranks: int, micro_batch_packs: int) -> list[list[tuple[int, ...]]]:
    """Which packs each rank runs in each micro-batch.

    Packs are sorted by descending cost and cut into micro-batches of ``num_ranks * micro_batch_packs``; inside one,
    each goes to the rank with the least cost that still has room. Only the last micro-batch can be short.

    Args:
        costs: of each pack, in any unit.

    Returns:
        ``[micro-batch][rank]`` -> numbers of packs; empty: the rank runs a filler.
    """
    order = np.argsort(-np.array(costs, dtype=np.float64), kind="stable").tolist()
    per_micro_batch = num_ranks * micro_batch_packs
    dealt = []
    for begin in range(0, len(order), per_micro_batch):
        hands: list[list[int]] = [[] for _ in range(num_ranks)]
        open_ranks = [(0.0, rank) for rank in range(num_ranks)]  # a heap: those with room, the least cost first
        for number in order[begin : begin + per_micro_batch]:
            load, rank = open_ranks[0]
            hands[rank].append(number)
            if len(hands[rank]) < micro_batch_packs:
                heapq.heapreplace(open_ranks, (load + costs[number], rank))
            else:
                heapq.heappop(open_ranks)
        dealt.append([tuple(hand) for hand in hands])
    return dealt

"""Deal the packs of one step to micro-batches and ranks.

Under ZeRO-3 every layer of every micro-batch is a barrier: the slowest rank of each micro-batch decides its time. So
packs that run at the same micro-batch index must cost alike; totals per rank do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dsft.sampling.types import Pieces


def pack_cost(pieces: Pieces, a: float, b: float) -> float:
    """``a * tokens + b * sum(length^2)`` of a pack: matrix products go by tokens, causal attention by pairs of tokens.

    Args:
        a, b: time (or operations) per token, and per squared token of a document.
    """
    lengths = pieces.length.astype(np.float64)
    return float(a * np.add.reduce(lengths) + b * np.dot(lengths, lengths))


def deal(
    packs: Sequence[Pieces], cost: Callable[[Pieces], float], num_ranks: int, micro_batch_packs: int
) -> list[list[tuple[int, ...]]]:
    """Which packs each rank runs in each micro-batch.

    Packs are sorted by descending cost and cut into micro-batches of ``num_ranks * micro_batch_packs``; inside one,
    each goes to the rank with the least cost that still has room. Only the last micro-batch can be short.

    Returns:
        ``[micro-batch][rank]`` -> numbers of packs; empty: the rank runs a filler.
    """
    costs = [cost(pack) for pack in packs]
    order = sorted(range(len(packs)), key=lambda number: (-costs[number], number))
    per_micro_batch = num_ranks * micro_batch_packs
    dealt = []
    for begin in range(0, len(order), per_micro_batch):
        hands: list[list[int]] = [[] for _ in range(num_ranks)]
        loads = [0.0] * num_ranks
        for number in order[begin : begin + per_micro_batch]:
            rank = min((r for r in range(num_ranks) if len(hands[r]) < micro_batch_packs), key=lambda r: (loads[r], r))
            hands[rank].append(number)
            loads[rank] += costs[number]
        dealt.append([tuple(hand) for hand in hands])
    return dealt

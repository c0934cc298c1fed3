"""How evenly the packs of a step are dealt to ranks.

Under ZeRO-3 every layer of every micro-batch is a barrier, so a step takes as long as the dearest rank of each
micro-batch: the ratio here is the sum over micro-batches of the maximum over ranks of the cost, over the same sum of
the mean; 1 is perfect. ``balanced`` deals packs as the loader does, ``unbalanced`` in the plan's order. Cost is that of
a Llama-8B (operations for tokens and for pairs of tokens under causal attention); ``sum_of_squares`` is the same with
attention alone. 8 ranks, packs of 32,768 tokens of lognormal documents, 16 micro-batches a step (and 1 and 4 beside
it), one pack a micro-batch. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from transformers import LlamaConfig

from dsft.model.flops import model_cost
from dsft.sampling.balance import deal, pack_costs
from dsft.sampling.plan import Planner
from dsft.sampling.types import Pieces, PlannedSource, Stage

NUM_RANKS, PACK_TOKENS, MEAN_TOKENS, SIGMA = 8, 32_768, 2921, 1.2
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
)


def make_planner(global_batch_packs: int, num_steps: int) -> Planner:
    """Steps of lognormal documents."""
    tokens = num_steps * global_batch_packs * PACK_TOKENS
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, int(1.1 * tokens / MEAN_TOKENS) + 1000)
    shards = np.array_split(lengths.clip(8, PACK_TOKENS).astype(np.int32), 16)
    return Planner(
        [PlannedSource("lognormal", len(shards), shards.__getitem__)],
        [Stage("all", None, (1.0,))],
        seed=17,
        pack_tokens=PACK_TOKENS,
        global_batch_packs=global_batch_packs,
        window_documents=65_536,
        window_tokens=16_000_000,
        group_shards=16,
        overlong="split",
        train_tokens=tokens,
    )


def in_plan_order(packs: Sequence[Pieces]) -> list[list[tuple[int, ...]]]:
    """One pack a rank and micro-batch, as they come."""
    return [[(number,) for number in range(first, first + NUM_RANKS)] for first in range(0, len(packs), NUM_RANKS)]


def measure(
    num_micro_batches: int, num_steps: int, costs_of: Callable[[Sequence[Pieces]], list[float]]
) -> dict[str, float]:
    """The ratio with packs dealt and in the plan's order, over whole steps."""
    slowest = {"balanced": 0.0, "unbalanced": 0.0}
    mean = 0.0
    planner = make_planner(num_micro_batches * NUM_RANKS, num_steps)
    for step in planner.steps(planner.start()):
        if len(step.packs) < num_micro_batches * NUM_RANKS:
            break
        costs = np.array(costs_of(step.packs))
        mean += costs.sum() / NUM_RANKS
        for name, dealt in {
            "balanced": deal(costs.tolist(), NUM_RANKS, 1),
            "unbalanced": in_plan_order(step.packs),
        }.items():
            slowest[name] += sum(max(costs[list(hand)].sum() for hand in hands) for hands in dealt)
    return {name: round(float(total / mean), 4) for name, total in slowest.items()}


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="10 times the steps")
    num_packs = 128 * (500 if parser.parse_args().full else 50)
    model = model_cost(LLAMA_8B)
    costs: dict[str, Callable[[Sequence[Pieces]], list[float]]] = {
        "llama_8b": partial(pack_costs, a=model.flops_per_token, b=model.flops_per_token_pair),
        "sum_of_squares": partial(pack_costs, a=0.0, b=1.0),
    }
    results = {
        name: {f"micro_batches_{m}": measure(m, num_packs // (m * NUM_RANKS), cost) for m in (16, 4, 1)}
        for name, cost in costs.items()
    }
    for name, ratios in results.items():
        for kind, ratio in ratios.items():
            print(f"{name:>15} {kind:>16}: {ratio}")
    print(json.dumps({"benchmark": "balance", **results["llama_8b"]["micro_batches_16"], **results}))


if __name__ == "__main__":
    main()

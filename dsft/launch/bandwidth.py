"""How fast the hosts of a run talk to each other: a program that ``dsft doctor`` starts once on each of them.

An all-reduce, an all-gather, and every pair of hosts alone. Pairs meet in rounds of a tournament (the circle method):
in each round every host has one partner, so n hosts need n - 1 rounds and not n * (n - 1) / 2 turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import combinations
from typing import Any

from dsft.address import choose_interface
from dsft.launch.checks import Finding
from dsft.world import World

MARK = "DSFT-BANDWIDTH "
SLOW_SHARE = 1 / 3
"""Of the fastest pair's speed: a slower pair is named. Hosts under one switch and under two differ by less."""
_REPEATS = 3
_TIMEOUT = timedelta(seconds=60)
_NUM_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}


def rounds(num_hosts: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs in which each pair of hosts meets once and no host is twice in a round."""
    places: list[int | None] = [*range(num_hosts), *([None] if num_hosts % 2 else [])]
    plan = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        plan.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return plan


def judge_bandwidth(result: dict[str, Any], names: Sequence[str]) -> list[Finding]:
    """What the measurement says.

    Args:
        result: ``all_reduce`` and ``all_gather`` in bytes a second that a host sends, ``pairs`` as a matrix of them.
        names: of the hosts, by number.
    """
    pairs = {(a, b): result["pairs"][a][b] for a, b in combinations(range(len(names)), 2)}
    best = max(pairs.values())
    slow = {pair: speed for pair, speed in pairs.items() if speed < SLOW_SHARE * best}
    together = f"all-reduce {_speed(result['all_reduce'])}, all-gather {_speed(result['all_gather'])}"
    text = f"{together}, pairs up to {_speed(best)}"
    if not slow:
        return [Finding("bandwidth", "ok", text)]
    named = ", ".join(f"{names[a]} and {names[b]} {_speed(speed)}" for (a, b), speed in sorted(slow.items())[:8])
    common = set.intersection(*(set(pair) for pair in slow))
    who = f"the network of {names[common.pop()]}" if len(common) == 1 else "these hosts' network"
    fix = f"Look at {who}: cable, switch port, speed and MTU (ethtool, ip link)."
    return [Finding("bandwidth", "failure", f"{text}; slow: {named}", fix)]


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s"


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Take part in the measurement. Collective over the hosts.

    Args:
        request: ``rank`` (null: as SLURM says), ``size``, ``address`` and ``port`` of rank 0, ``device`` (cpu or cuda).
    """
    rank = int(os.environ["SLURM_NODEID"]) if request["rank"] is None else request["rank"]
    size, device = request["size"], request["device"]
    choose_interface(World(rank, size, 0, 1, rank, request["address"], request["port"], "environment"))
    import torch
    import torch.distributed as torch_dist

    torch_dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{request['address']}:{request['port']}",
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    data = torch.ones(_NUM_BYTES[device], dtype=torch.uint8, device=device)
    parts = [torch.empty_like(data) for _ in range(size)]
    share = (size - 1) / size * data.numel()

    def best_seconds(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(_REPEATS):
            torch_dist.barrier()
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    result: dict[str, Any] = {
        "rank": rank,
        "all_reduce": 2 * share / best_seconds(lambda: torch_dist.all_reduce(data)),
        "all_gather": size * share / best_seconds(lambda: torch_dist.all_gather(parts, data)),
    }
    speeds = torch.zeros(size, dtype=torch.float64)
    for pairs in rounds(size):
        partner = next((b if a == rank else a for a, b in pairs if rank in (a, b)), None)

        def there_and_back(partner: int | None = partner) -> None:
            if partner is not None and rank < partner:
                torch_dist.send(data, partner)
                torch_dist.recv(data, partner)
            elif partner is not None:
                torch_dist.recv(data, partner)
                torch_dist.send(data, partner)

        seconds = best_seconds(there_and_back)
        if partner is not None:
            speeds[partner] = 2 * data.numel() / seconds
    rows = [torch.zeros_like(speeds).to(device) for _ in range(size)]
    torch_dist.all_gather(rows, speeds.to(device))
    torch_dist.destroy_process_group()
    return {**result, "pairs": [row.tolist() for row in rows]}


if __name__ == "__main__":
    measured = measure(json.loads(sys.argv[1]))
    if measured["rank"] == 0:
        sys.stdout.write(MARK + json.dumps(measured) + "\n")

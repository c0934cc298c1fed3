"""Loss and its gradients: ``masked_linear_cross_entropy`` against ``F.linear`` and ``F.cross_entropy``.

2,048 positions, hidden size 512, vocabulary 32,000, fp32 on the CPU, forward and backward, with 0, 50 and 90 % of the
positions masked; ``torch_chunked`` is torch's ``F.linear_cross_entropy`` (where torch has it), which never holds all
logits, and runs in one round only. The others run in each round, in another order each time; a round gives one ratio.
``speedup_90`` is the median of them and ``interval_90`` the lowest and highest: with six rounds, the median of all
rounds that could be run lies between them with 96.9 % (order statistics). Peak memory is the growth of the resident
set over one forward and backward, in a process of its own for each side; ``memory_90`` is our peak divided by torch's.

Without arguments under three minutes on two idle cores; ``--full`` runs more rounds, also with 99 % masked. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from dsft.ops import backend
from dsft.ops.linear_cross_entropy import masked_linear_cross_entropy

POSITIONS, HIDDEN, VOCAB = 2048, 512, 32_000
PERCENT_MASKED, ROUNDS = (0, 50, 90), 6
FULL_PERCENT_MASKED, FULL_ROUNDS = (0, 50, 90, 99), 20
CHUNKED_ROUNDS = 1
"""Of torch's chunked loss, several times as slow as the others."""
ENOUGH_SECONDS = 42.0
"""Of one setting's rounds: on a machine that is busy with other work there are fewer of them, but at least two."""


def sides(percent_masked: int) -> dict[str, Callable[[], None]]:
    """The programs over the same numbers, each with its forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.04).requires_grad_()
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=generator)
    targets[torch.randperm(POSITIONS, generator=generator)[: POSITIONS * percent_masked // 100]] = -100
    rows = torch.nonzero(targets != -100)[:, 0]
    row_weight = torch.full(rows.shape, 1.0 / len(rows))

    def torchs() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets)

    def torchs_chunked() -> torch.Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())

    def ours() -> torch.Tensor:
        return masked_linear_cross_entropy(hidden, weight, None, rows, targets[rows], row_weight).loss

    def with_backward(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            hidden.grad = weight.grad = None
            torch.autograd.backward(loss())

        return call

    losses = {"torch": torchs, "ours": ours}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        losses["torch_chunked"] = torchs_chunked
    return {name: with_backward(loss) for name, loss in losses.items()}


def seconds(call: Callable[[], None]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(percent_masked: int, most: int, enough_seconds: float) -> list[dict[str, float]]:
    """Seconds of every side, by round; one more round before them is thrown away."""
    calls = sides(percent_masked)
    start, found = time.perf_counter(), []
    for number in range(most + 1):
        names = [name for name in calls if name != "torch_chunked" or number <= CHUNKED_ROUNDS]
        found.append({name: seconds(calls[name]) for name in (names if number % 2 else names[::-1])})
        if number >= 2 and time.perf_counter() - start > enough_seconds:
            break
    return found[1:]


def peak_bytes(side: str, percent_masked: int) -> int:
    """Growth of the resident set over one forward and backward, measured in a fresh process."""
    command = [sys.executable, __file__, "--peak", side, str(percent_masked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout.split()[-1])


def status_bytes(field: str) -> int:
    """A size of this process as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def measure_peak(side: str, percent_masked: int) -> int:
    """In the fresh process: the most that was resident during the call, less what was before it."""
    call = sides(percent_masked)[side]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more rounds, and 99 %% masked too")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "PERCENT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    backend.choose("native")
    if arguments.peak:
        print(measure_peak(arguments.peak[0], int(arguments.peak[1])))
        return
    figures: dict[str, object] = {}
    for percent in FULL_PERCENT_MASKED if arguments.full else PERCENT_MASKED:
        found = rounds(percent, *((FULL_ROUNDS, float("inf")) if arguments.full else (ROUNDS, ENOUGH_SECONDS)))
        print(
            f"{percent} % masked:", *(f"{n} {statistics.median(r[n] for r in found if n in r):.3f} s" for n in found[0])
        )
        for name, prefix in (("ours", ""), ("torch_chunked", "torch_chunked_")):
            if name in found[0]:
                ratios = [times["torch"] / times[name] for times in found if name in times]
                figures[f"{prefix}speedup_{percent}"] = round(statistics.median(ratios), 2)
                figures[f"{prefix}interval_{percent}"] = [round(min(ratios), 2), round(max(ratios), 2)]
        figures[f"rounds_{percent}"] = len(found)
    peaks = {side: peak_bytes(side, 90) for side in sides(90)}
    print("90 % masked, peak:", *(f"{side} {peak / 2**20:.0f} MiB" for side, peak in peaks.items()))
    for side, peak in peaks.items():
        if side != "torch":
            figures["memory_90" if side == "ours" else f"{side}_memory_90"] = round(peak / peaks["torch"], 3)
    shape = {"positions": POSITIONS, "hidden": HIDDEN, "vocabulary": VOCAB, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "loss", **figures, **shape}))


if __name__ == "__main__":
    main()

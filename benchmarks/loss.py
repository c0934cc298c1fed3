"""Loss and its gradients: ``masked_linear_cross_entropy`` against ``F.linear`` and ``F.cross_entropy``.

2,048 positions, hidden size 512, vocabulary 32,000, fp32 on the CPU, forward and backward, with 0, 50 and 90 % of the
positions masked. Both sides run in turns in one process; the figure is the ratio of their fastest times, which other
work on the machine disturbs least. Peak memory is the growth of the resident set over one forward and backward, in a
process of its own for each side. The last line is one JSON object; ``memory_90`` is our peak divided by torch's.
"""

from __future__ import annotations

import json
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
MASKED = {"0": 0.0, "50": 0.5, "90": 0.9}
REPETITIONS = 5


def sides(masked: float) -> dict[str, Callable[[], None]]:
    """Both programs over the same numbers, each with its forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.04).requires_grad_()
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=generator)
    targets[torch.rand(POSITIONS, generator=generator) < masked] = -100
    rows = torch.nonzero(targets != -100)[:, 0]
    row_weight = torch.full(rows.shape, 1.0 / len(rows))

    def torchs() -> None:
        hidden.grad = weight.grad = None
        F.cross_entropy(F.linear(hidden, weight), targets).backward()

    def ours() -> None:
        hidden.grad = weight.grad = None
        masked_linear_cross_entropy(hidden, weight, None, rows, targets[rows], row_weight).loss.backward()

    return {"torch": torchs, "ours": ours}


def seconds(call: Callable[[], None]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speedup(masked: float) -> float:
    """Torch's fastest time divided by ours."""
    both = sides(masked)
    for call in both.values():
        call()
    best = dict.fromkeys(both, float("inf"))
    for _ in range(REPETITIONS):
        for name, call in both.items():
            best[name] = min(best[name], seconds(call))
    print(f"{masked:4.0%} masked: torch {best['torch']:.3f} s, ours {best['ours']:.3f} s")
    return best["torch"] / best["ours"]


def peak_bytes(side: str, masked: float) -> int:
    """Growth of the resident set over one forward and backward, measured in a fresh process."""
    command = [sys.executable, __file__, "--peak", side, str(masked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=170)
    return int(done.stdout.split()[-1])


def status_bytes(field: str) -> int:
    """A size of this process as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def measure_peak(side: str, masked: float) -> int:
    """In the fresh process: the most that was resident during the call, less what was before it."""
    call = sides(masked)[side]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def main() -> None:
    """Measure, print, and end with one JSON object."""
    backend.choose("native")
    if sys.argv[1:2] == ["--peak"]:
        print(measure_peak(sys.argv[2], float(sys.argv[3])))
        return
    figures = {f"speedup_{name}": round(speedup(masked), 2) for name, masked in MASKED.items()}
    peaks = {side: peak_bytes(side, 0.9) for side in ("torch", "ours")}
    print(f" 90% masked: peak torch {peaks['torch'] / 2**20:.0f} MiB, ours {peaks['ours'] / 2**20:.0f} MiB")
    figures["memory_90"] = round(peaks["ours"] / peaks["torch"], 3)
    shape = {"positions": POSITIONS, "hidden": HIDDEN, "vocabulary": VOCAB, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "loss", **figures, **shape}))


if __name__ == "__main__":
    main()

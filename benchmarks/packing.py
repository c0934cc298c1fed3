"""How fast the planner draws and packs documents on one core, how full the packs are, and what it costs in memory.

Lengths are lognormal (mean 700 tokens, sigma 1, at least 8), drawn in random order and packed in windows of 65,536
documents by best-fit-decreasing: the planner that training uses, with its native parts. Beside it: packs of 65,536
tokens, the packings that keep the order, the whole list at once, the planner's Python reference, steps as the loader
takes them, and TRL's own packer where TRL is installed. "docs" of concat_and_split are pieces.

``docs_per_second`` is by processor time of the one thread that works (``docs_per_second_wall``: by the clock, which a
loaded machine slows). ``bytes_per_doc`` is the growth of the process while the whole list is packed at once, over its
documents; ``window_mib`` the growth while windows are drawn and packed, with the lengths of the open group.
``density`` is document tokens over pack tokens. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsft.ops import backend
from dsft.sampling.packing import PackingMethod, best_fit_decreasing
from dsft.sampling.plan import Planner
from dsft.sampling.types import PlannedSource, Stage

MEAN_TOKENS, SIGMA, SHORTEST_TOKENS = 700, 1.0, 8
WINDOW_DOCUMENTS = 65_536
NUM_SHARDS = 160


def draw_lengths(count: int, pack_tokens: int) -> npt.NDArray[np.int32]:
    """Lognormal lengths, int32[count]. Clipped to a pack, so that density is the packer's and not the splitter's."""
    rng = np.random.default_rng(0)
    lengths = np.empty(count, dtype=np.int32)
    for begin in range(0, count, 1_000_000):
        part = lengths[begin : begin + 1_000_000]
        part[:] = rng.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, len(part)).clip(SHORTEST_TOKENS, pack_tokens)
    return lengths


def make_planner(
    lengths: npt.NDArray[np.int32],
    pack_tokens: int,
    window_tokens: int | None = None,
    packing: PackingMethod = "best_fit_decreasing",
) -> Planner:
    """A planner of one pass over the documents."""
    shards = np.array_split(lengths, NUM_SHARDS)
    return Planner(
        [PlannedSource("lognormal", NUM_SHARDS, shards.__getitem__)],
        [Stage("all", None, (1.0,))],
        seed=17,
        pack_tokens=pack_tokens,
        global_batch_packs=128,
        window_documents=WINDOW_DOCUMENTS,
        window_tokens=window_tokens or 2**62,
        group_shards=16,
        overlong="split",
        train_tokens=int(lengths.sum(dtype=np.int64)),
        packing=packing,
    )


def measure_windows(planner: Planner, pack_tokens: int) -> dict[str, float]:
    """Draw and pack all windows."""
    documents = tokens = packs = 0
    before = start_peak()
    wall, processor = time.perf_counter(), time.process_time()
    for window in planner.windows(planner.start()):
        documents += len(window.pieces.length)
        tokens += int(window.tokens_before_pack[-1])
        packs += window.num_packs
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {
        "docs": documents,
        "docs_per_second": round(documents / processor),
        "docs_per_second_wall": round(documents / wall),
        "density": round(tokens / (packs * pack_tokens), 6),
        "window_mib": round((peak_bytes() - before) / 2**20, 1),
    }


def measure_steps(planner: Planner) -> float:
    """Documents per second of processor time when steps are taken, with the hash of each."""
    processor = time.process_time()
    documents = sum(len(pack.length) for step in planner.steps(planner.start()) for pack in step.packs)
    return round(documents / (time.process_time() - processor))


def measure_whole_list(lengths: npt.NDArray[np.int32], pack_tokens: int) -> dict[str, float]:
    """Pack all documents at once, without drawing them."""
    before = start_peak()
    processor = time.process_time()
    packing = best_fit_decreasing(lengths, pack_tokens)
    processor = time.process_time() - processor
    grown = peak_bytes() - before
    num_packs = len(packing.offsets) - 1
    return {
        "docs_per_second": round(len(lengths) / processor),
        "density": round(int(lengths.sum(dtype=np.int64)) / (num_packs * pack_tokens), 6),
        "bytes_per_doc": round(grown / len(lengths), 2),
    }


def measure_trl(lengths: npt.NDArray[np.int32], pack_tokens: int) -> dict[str, float | str] | str:
    """TRL's best-fit-decreasing packer over the same lengths, whole list in one batch.

    It moves the token ids too, which are zeros here.
    """
    if importlib.util.find_spec("trl") is None:
        return "not installed"
    import datasets
    import pyarrow
    import trl
    from trl.data_utils import pack_dataset

    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    ids = pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(np.zeros(offsets[-1], dtype=np.int32)))
    dataset = datasets.Dataset(pyarrow.table({"input_ids": ids}))
    datasets.disable_caching()
    datasets.disable_progress_bars()
    processor = time.process_time()
    packed = pack_dataset(dataset, pack_tokens, strategy="bfd", map_kwargs={"batch_size": len(lengths)})
    processor = time.process_time() - processor
    return {
        "version": trl.__version__,
        "docs": len(lengths),
        "docs_per_second": round(len(lengths) / processor),
        "density": round(int(lengths.sum(dtype=np.int64)) / (len(packed) * pack_tokens), 6),
    }


def start_peak() -> int:
    """Forget the process's peak of resident memory; its resident memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Peak of resident memory since :func:`start_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, key
    return int(match[1]) * 1024


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="10 times the documents for the reference and TRL")
    arguments = parser.parse_args()
    few = 1_000_000 if arguments.full else 100_000
    backend.choose("native")
    lengths = draw_lengths(10_000_000, 8192)
    best_fit_decreasing(lengths[:1000], 8192)  # the library is built and loaded
    windows = measure_windows(make_planner(lengths, 8192), 8192)
    print(f"windows of {WINDOW_DOCUMENTS} documents, packs of 8192: {windows}")
    whole = measure_whole_list(lengths, 8192)
    print(f"whole list at once: {whole}")
    steps = measure_steps(make_planner(lengths[:1_000_000], 8192))
    print(f"steps of 128 packs: {steps} documents per second")
    default_window = measure_windows(make_planner(lengths[:1_000_000], 8192, 16_000_000), 8192)
    print(f"the default window (16,000,000 tokens): {default_window}")
    in_order: dict[str, dict[str, float]] = {}
    methods: tuple[PackingMethod, ...] = ("next_fit", "concat_and_split")
    for method in methods:
        in_order[method] = measure_windows(make_planner(lengths[:1_000_000], 8192, packing=method), 8192)
        print(f"{method}: {in_order[method]}")
    trl = measure_trl(lengths[: few // 5], 8192)
    print(f"TRL: {trl}")
    long_lengths = draw_lengths(10_000_000, 65_536)
    long_packs = measure_windows(make_planner(long_lengths, 65_536), 65_536)
    print(f"packs of 65,536: {long_packs}")
    backend.choose("reference")
    reference = measure_windows(make_planner(lengths[:few], 8192), 8192)
    print(f"Python reference: {reference}")
    result = {
        "benchmark": "packing",
        **windows,
        "bytes_per_doc": whole["bytes_per_doc"],
        "whole_list": whole,
        "steps_docs_per_second": steps,
        "default_window": default_window,
        "packs_of_65536": long_packs,
        **in_order,
        "python_reference": reference,
        "trl": trl,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

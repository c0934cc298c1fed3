"""What dsft's own loop costs on top of a plain DeepSpeed loop: ``ratio`` = time of dsft / time of the plain loop.

Both train the same engine (ZeRO-3, dsft's wrapped model and head) in one process group on the same batches. dsft runs
``dsft.train.loop.train`` with planning, collating, control message, data log, metrics and a record each step. The
plain loop gets those batches ready-made and does forward, backward and step, nothing else. Evaluation and checkpoints
are left out of both: they are not part of a step.

Blocks of steps alternate, dsft then plain; each pair gives one ratio. Reported is the median over the pairs with its
distribution-free 95 % interval (order statistics). ``cpu_ratio`` is the same of the processor seconds of the process,
the loader's thread included: it counts work that overlaps, and less of what else runs on the machine.

One process by default; more ranks under any launcher, for example ``torchrun --nproc_per_node 2
benchmarks/step_overhead.py``. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsft import dist
from dsft.batch.loader import Loader
from dsft.batch.types import StepBatch, model_inputs
from dsft.config.deepspeed import build_deepspeed_config
from dsft.config.models import RunConfig
from dsft.demo.corpus import language_reference
from dsft.demo.tokenizer import make_tokenizer
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from dsft.launch.owner import take_run_folder
from dsft.launch.progress import Progress
from dsft.launch.stop import StopFlag
from dsft.model.flops import model_cost
from dsft.sampling.types import Cursor
from dsft.train import setup
from dsft.train.loop import Run, train
from dsft.train.start import Options, Phases, Rank, build_run
from dsft.train.state import TrainState
from dsft.world import discover_world

LIMIT = 1.03
NUM_PAIRS, BLOCKS_SECONDS = 24, 75.0
FULL_NUM_PAIRS, FULL_BLOCKS_SECONDS = 60, 600.0
# On the CPU a step of some 0.3 s; on a GPU a model whose step is not all launch overhead.
CPU_SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
CUDA_SHAPE = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16}


class Clock(NamedTuple):
    """Two clocks of one process."""

    wall_seconds: float
    cpu_seconds: float


class Feed:
    """dsft's loader, kept running from block to block; remembers what it gave out in a block.

    The loop takes one batch ahead of the step it runs; that one comes again at the beginning of the next block.
    """

    def __init__(self, loader: Loader, cursor: Cursor) -> None:
        self._loader = loader
        self._batches = loader.steps(cursor)
        self.taken: list[StepBatch] = []

    @property
    def wait_seconds(self) -> float:
        """As of the loader."""
        return self._loader.wait_seconds

    def steps(self, _cursor: Cursor) -> Iterator[StepBatch]:
        """The batches of one block; goes on where the last block stood."""
        again, self.taken = self.taken[-1:], []
        for batch in chain(again, self._batches):
            self.taken.append(batch)
            yield batch


class Nothing:
    """Stands in for evaluation and checkpoints: never due, does nothing."""

    num_tasks_done = 0
    saved_step = None

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args: None


def make_config(folder: Path, device_type: str, num_ranks: int) -> RunConfig:
    """A Llama from scratch over raw text, two micro-batches a step on each rank."""
    on_cuda = device_type == "cuda"
    return RunConfig.model_validate(
        {
            "run": {"name": "step-overhead", "dir": str(folder / "run")},
            "model": {
                "config": {"model_type": "llama", "vocab_size": 4096, **(CUDA_SHAPE if on_cuda else CPU_SHAPE)},
                "tokenizer": str(folder / "tokenizer"),
                "dtype": "bf16" if on_cuda else "fp32",
            },
            "data": {
                "pack_tokens": 4096 if on_cuda else 256,
                "store_dir": str(folder / "store"),
                "sources": [{"name": "reference", "path": str(folder / "reference.jsonl")}],
            },
            "train": {"steps": 10**6, "global_batch_packs": 2 * num_ranks, "lr": 1e-6},
            "deepspeed": {"zero_optimization": {"stage": 3}},
        }
    )


def make_inputs(folder: Path) -> None:
    """Tokenizer and raw text."""
    topics = language_reference()
    make_tokenizer(topics.values(), folder / "tokenizer", identity="step-overhead")
    (folder / "reference.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))


def make_run(folder: Path, groups: dist.Groups, device_type: dist.DeviceType) -> tuple[Run, TrainState, Feed]:
    """The run as ``dsft train`` builds it, but for evaluation, checkpoints and the console."""
    config = make_config(folder, device_type, groups.size)
    tokenizer, stop = setup.open_tokenizer(config), StopFlag()
    data = setup.open_data(config, tokenizer, stop, worker=groups.rank, num_workers=groups.size)
    deepspeed_config = build_deepspeed_config(config, groups.size, device_type)
    engine, hf_config = setup.build_engine(config, data, groups, None, deepspeed_config, device_type)
    owned = take_run_folder(folder / "run", groups)
    rank = Rank(groups, device_type, deepspeed_config, owned, stop, Progress(), Phases())
    run, state = build_run(config, Options(), data, rank, engine, hf_config, model_cost(hf_config))
    feed = Feed(run.loader, state.cursor)
    nothing: Any = Nothing()
    loader: Any = feed
    return replace(run, loader=loader, saver=nothing, evaluation=nothing), state, feed


def run_dsft(run: Run, state: TrainState, num_steps: int) -> Clock:
    """Time of a block in dsft's loop."""
    begin = _start_clock(run)
    train(replace(run, max_steps=state.step + num_steps), state)
    return _stop_clock(run, begin)


def run_plain(run: Run, batches: Sequence[StepBatch]) -> Clock:
    """Time of the same steps in a plain loop; the global weights are known beforehand."""
    local = [math.fsum(micro_batch.weight_sum for micro_batch in batch.micro_batches) for batch in batches]
    weights = run.groups.sum(torch.tensor(local, dtype=torch.float64).numpy()).tolist()
    engine, num_ranks = run.engine, run.groups.size
    begin = _start_clock(run)
    for batch, weight in zip(batches, weights, strict=True):
        for micro_batch in batch.micro_batches:
            output = engine(**model_inputs(micro_batch, engine.device))
            engine.backward(output.loss * (num_ranks / weight), scale_wrt_gas=False)
        engine.step()
    return _stop_clock(run, begin)


def _start_clock(run: Run) -> Clock:
    run.groups.barrier()
    _wait_for_device(run)
    return Clock(time.perf_counter(), time.process_time())


def _stop_clock(run: Run, begin: Clock) -> Clock:
    _wait_for_device(run)
    return Clock(time.perf_counter() - begin.wall_seconds, time.process_time() - begin.cpu_seconds)


def _wait_for_device(run: Run) -> None:
    if run.engine.device.type == "cuda":
        torch.cuda.synchronize()


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median by order statistics: no assumption on the distribution; its coverage is at least that."""
    ordered, num = sorted(values), len(values)
    lowest = 0
    below = math.comb(num, 0) / 2**num
    while lowest + 1 < num // 2 and 2 * (below + math.comb(num, lowest + 1) / 2**num) <= 1 - confidence:
        lowest += 1
        below += math.comb(num, lowest) / 2**num
    return ordered[lowest], ordered[num - 1 - lowest]


def measure(run: Run, state: TrainState, feed: Feed, num_pairs: int, blocks_seconds: float) -> dict[str, Any]:
    """Alternate the blocks and sum up."""
    run_dsft(run, state, 2)  # first steps allocate, trace and compile
    run_plain(run, feed.taken[:-1])
    step_seconds = run_dsft(run, state, 2).wall_seconds / 2
    num_steps = max(2, round(blocks_seconds / (2 * num_pairs * step_seconds)))
    num_steps = int(run.groups.broadcast_object(num_steps))
    dsft, plain = [], []
    for _ in range(num_pairs):
        dsft.append(run_dsft(run, state, num_steps))
        plain.append(run_plain(run, feed.taken[:num_steps]))
    wall = [mine.wall_seconds / theirs.wall_seconds for mine, theirs in zip(dsft, plain, strict=True)]
    cpu = [mine.cpu_seconds / theirs.cpu_seconds for mine, theirs in zip(dsft, plain, strict=True)]
    return {
        "ratio": round(statistics.median(wall), 4),
        "interval_95": [round(end, 4) for end in median_interval(wall)],
        "limit": LIMIT,
        "cpu_ratio": round(statistics.median(cpu), 4),
        "cpu_interval_95": [round(end, 4) for end in median_interval(cpu)],
        "num_pairs": num_pairs,
        "steps_per_block": num_steps,
        "dsft_step_seconds": round(statistics.median(block.wall_seconds for block in dsft) / num_steps, 5),
        "plain_step_seconds": round(statistics.median(block.wall_seconds for block in plain) / num_steps, 5),
        "num_ranks": run.groups.size,
        "device": torch.cuda.get_device_name() if run.engine.device.type == "cuda" else "cpu",
    }


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more and longer blocks: ten minutes instead of two")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_pairs, blocks_seconds = (FULL_NUM_PAIRS, FULL_BLOCKS_SECONDS) if arguments.full else (NUM_PAIRS, BLOCKS_SECONDS)
    world = discover_world(os.environ, arguments.local_rank)
    device_type = setup.choose_device_type(os.environ)
    if device_type == "cpu":  # compute leaves a core to the loader's thread, as it does where a GPU computes
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size - 1))
    prepare_deepspeed_ops(needed_ops(device_type, cpu_adam=False), device_type)
    groups = dist.init(world, device_type)
    with tempfile.TemporaryDirectory(prefix="dsft-step-overhead-") as own:
        folder = Path(groups.broadcast_object(own))
        if groups.rank == 0:
            make_inputs(folder)
        groups.barrier()
        run, state, feed = make_run(folder, groups, device_type)
        result = measure(run, state, feed, num_pairs, blocks_seconds)
        run.recorder.close()
        groups.close()
    if world.rank == 0:
        print(json.dumps({"benchmark": "step_overhead", **result}))


if __name__ == "__main__":
    main()

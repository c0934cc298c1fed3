"""Tokens per second of packed, shuffled batches from a token store on the local disk, on one core.

The loader plans, packs, reads, lays rows out with positions, document borders and supervised rows, and hashes what it
made. Beside it: a bare gather of the same spans of the same token files from ``numpy.memmap`` into one array a pack,
and the other loaders that are installed (``loader_peers.py``: datasets, litdata, mosaicml-streaming) over the same
tokens, whose rows have no borders. The files lie in the page cache. Speeds are by processor time of the process, so by
one core. ``fraction_of_memmap`` is the loader's speed over the gather's: the median of rounds in which one is measured
right after the other. ``over_peers`` is the loader's median speed over a peer's. The last line is one JSON object.

mosaicml-streaming needs versions of numpy and transformers that dsft does not take, and both it and litdata bring
torchvision, which must be of the same build as torch: give each an interpreter of its own, ``python -m venv V;
V/bin/pip install litdata torch``, then ``--peer-python V/bin/python``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dsft.batch.collate import BatchSpec
from dsft.batch.loader import Loader
from dsft.ops import backend
from dsft.sampling.balance import pack_costs
from dsft.sampling.plan import Planner
from dsft.sampling.types import Cursor, PlannedSource, Stage
from dsft.store.collect import collect_manifest
from dsft.store.manifest import write_manifest
from dsft.store.reader import SourceStore
from dsft.store.types import Document
from dsft.store.writer import ShardWriter

PACK_TOKENS, MEAN_TOKENS, SIGMA, VOCAB_TOKENS, NUM_SHARDS = 8192, 700, 1.0, 50_000, 16
SPANS, SPAN_WEIGHTS = np.zeros((1, 2), dtype=np.int32), np.ones(1, dtype=np.float32)


def documents(num_tokens: int) -> Iterator[npt.NDArray[np.int32]]:
    """Documents of random tokens and lognormal lengths, about ``num_tokens`` in all."""
    rng = np.random.default_rng(0)
    count = num_tokens // MEAN_TOKENS
    lengths = rng.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, count).clip(8, 4 * PACK_TOKENS)
    for length in lengths.astype(int):
        yield rng.integers(0, VOCAB_TOKENS, length, dtype=np.int32)


def make_store(folder: Path, num_tokens: int) -> SourceStore:
    """A token store of raw text: every document is supervised whole."""
    writers = [ShardWriter(folder, shard, np.uint16, f"raw-{shard}") for shard in range(NUM_SHARDS)]
    for number, ids in enumerate(documents(num_tokens)):
        span = np.array([[0, len(ids)]], dtype=np.int32)
        writers[number % NUM_SHARDS].add(Document(ids, span, SPAN_WEIGHTS, num_bytes=4 * len(ids)))
    for writer in writers:
        writer.close()
    manifest = collect_manifest(
        folder, name="text", recipe={}, listing="", vocab_tokens=VOCAB_TOKENS, num_shards=NUM_SHARDS
    )
    write_manifest(folder, manifest)
    return SourceStore(folder)


def make_planner(store: SourceStore) -> Planner:
    """One pass over the store."""
    return Planner(
        [PlannedSource(store.name, store.num_shards, lambda shard: store.index(shard).lengths)],
        [Stage("all", None, (1.0,))],
        seed=17,
        pack_tokens=PACK_TOKENS,
        global_batch_packs=32,
        window_documents=65_536,
        window_tokens=16_000_000,
        group_shards=16,
        overlong="split",
        train_tokens=int(store.manifest.num_tokens.sum()),
    )


def make_loader(store: SourceStore) -> Loader:
    """The loader of a training process of one rank."""
    spec = BatchSpec((store,), (1.0,), "token", PACK_TOKENS, pad_id=0)
    return Loader(
        make_planner(store), spec, rank=0, num_ranks=1, micro_batch_packs=1, costs=partial(pack_costs, a=1.0, b=0.0)
    )


def measure_loader(loader: Loader, start: Cursor) -> dict[str, float]:
    """One pass. The first one of a loader also maps shards, verifies their blocks and gets memory from the system."""
    tokens = 0
    wall, processor = time.perf_counter(), time.process_time()
    for step in loader.steps(start):
        tokens += sum(batch.num_tokens for batch in step.micro_batches)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"tokens_per_second": round(tokens / processor), "tokens_per_second_wall": round(tokens / wall)}


def measure_memmap(store: SourceStore) -> float:
    """Tokens per second of a gather of the same spans; the plan is made before."""
    planner = make_planner(store)
    packs = []
    for step in planner.steps(planner.start()):
        for pack in step.packs:
            firsts = [
                int(store.index(shard).token_offsets[document]) + start
                for shard, document, start in zip(
                    pack.shard.tolist(), pack.document.tolist(), pack.start.tolist(), strict=True
                )
            ]
            packs.append(list(zip(pack.shard.tolist(), firsts, pack.length.tolist(), strict=True)))
    tokens_of = [
        np.memmap(Path(store.place) / f"shard-{shard:06d}.tokens", np.uint16, "r") for shard in range(NUM_SHARDS)
    ]
    tokens = 0
    processor = time.process_time()
    for spans in packs:
        row = np.concatenate([tokens_of[shard][first : first + length] for shard, first, length in spans])
        tokens += len(row)
    return round(tokens / (time.process_time() - processor))


def write_documents(folder: Path, num_tokens: int) -> None:
    """The documents as every peer's interpreter can read them."""
    folder.mkdir()
    whole = list(documents(num_tokens))
    np.save(folder / "lengths.npy", np.array([len(ids) for ids in whole], dtype=np.int32))
    np.save(folder / "tokens.npy", np.concatenate(whole).astype(np.uint16))


def measure_peers(python: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What ``loader_peers.py`` measures in an interpreter."""
    program = Path(__file__).with_name("loader_peers.py")
    with tempfile.TemporaryDirectory(dir=folder) as made:  # what one interpreter's peers wrote is not another's
        for path in folder.glob("*.npy"):
            os.link(path, Path(made) / path.name)
        command = [python, str(program), made]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": made}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)  # of this interpreter's packages
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="25 times the tokens")
    parser.add_argument("--peer-python", action="append", default=[], help="another interpreter with peers in it")
    arguments = parser.parse_args()
    num_tokens = 200_000_000 if arguments.full else 8_000_000
    torch.set_num_threads(1)
    backend.choose("native")
    with tempfile.TemporaryDirectory(prefix="dsft-loader-") as name:
        folder = Path(name)
        store = make_store(folder / "store", num_tokens)
        measure_memmap(store)  # brings the files into the page cache
        loader, start = make_loader(store), make_planner(store).start()
        first = measure_loader(loader, start)
        rounds = [(measure_memmap(store), measure_loader(loader, start)) for _ in range(7)]
        fractions = [round(run["tokens_per_second"] / memmap, 4) for memmap, run in rounds]
        memmap, best = max(rounds, key=lambda pair: pair[1]["tokens_per_second"])
        print(f"loader: first pass {first}, then {best}; memmap gather: {memmap} tokens per second")
        print(f"fractions of the gather: {sorted(fractions)}")
        write_documents(folder / "peers", num_tokens)
        peers: dict[str, dict[str, Any]] = {}
        for python in [sys.executable, *arguments.peer_python]:
            peers |= measure_peers(python, folder / "peers")
        print(f"peers: {peers}")
    speed = statistics.median(run["tokens_per_second"] for _, run in rounds)
    result = {
        "benchmark": "loader",
        **best,
        "first_pass_tokens_per_second": first["tokens_per_second"],
        "memmap_tokens_per_second": memmap,
        "fraction_of_memmap": statistics.median(fractions),
        "median_tokens_per_second": speed,
        **{name: peer["tokens_per_second"] for name, peer in peers.items()},
        "over_peers": {name: round(speed / peer["tokens_per_second"], 3) for name, peer in peers.items()},
        "peers": peers,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

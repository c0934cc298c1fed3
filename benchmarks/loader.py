"""Tokens per second of packed, shuffled batches from a token store on the local disk, on one core.

The loader plans, packs, reads, lays rows out with positions, document borders and supervised rows, and hashes what it
made. Beside it: a bare gather of the same spans of the same token files from ``numpy.memmap`` into one array a pack,
and Hugging Face ``datasets`` over the same documents, shuffled and concatenated to rows without borders. The files lie
in the page cache. Speeds are by processor time of the process, so by one core. ``fraction_of_memmap`` is the loader's
speed over the gather's: the median of rounds in which one is measured right after the other. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dsft.batch.collate import BatchSpec
from dsft.batch.loader import Loader
from dsft.ops import backend
from dsft.sampling.balance import pack_cost
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
        make_planner(store), spec, rank=0, num_ranks=1, micro_batch_packs=1, cost=lambda pack: pack_cost(pack, 1.0, 0.0)
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


def rows_of(streams: Iterator[npt.NDArray[np.int32]]) -> Iterator[torch.Tensor]:
    """Documents one after the other, cut into rows of a pack's length: int64[1, PACK_TOKENS]."""
    waiting: list[npt.NDArray[np.int32]] = []
    have = 0
    for ids in streams:
        waiting.append(ids)
        have += len(ids)
        while have >= PACK_TOKENS:
            joined = np.concatenate(waiting)
            yield torch.from_numpy(joined[:PACK_TOKENS].astype(np.int64))[None]
            waiting, have = [joined[PACK_TOKENS:]], have - PACK_TOKENS


def measure_stream(stream: Iterator[npt.NDArray[np.int32]]) -> float:
    """Tokens per second of rows made from a peer's shuffled documents."""
    processor = time.process_time()
    tokens = sum(row.numel() for row in rows_of(stream))
    return round(tokens / (time.process_time() - processor))


def measure_datasets(folder: Path, num_tokens: int) -> float:
    """Hugging Face datasets: an Arrow table, shuffled, as numpy."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    path = folder / "documents.parquet"
    ids = pyarrow.array(list(documents(num_tokens)), pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"ids": ids}), path, row_group_size=1000)
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder / "datasets")).with_format("numpy")
    return measure_stream(row["ids"] for row in table.shuffle(seed=17))


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="25 times the tokens")
    num_tokens = 200_000_000 if parser.parse_args().full else 8_000_000
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
        peer = measure_datasets(folder, num_tokens)
        print(f"datasets: {peer} tokens per second")
    result = {
        "benchmark": "loader",
        **best,
        "first_pass_tokens_per_second": first["tokens_per_second"],
        "memmap_tokens_per_second": memmap,
        "fraction_of_memmap": statistics.median(fractions),
        "datasets": peer,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""How fast training finds its place again in a source of 10^10 documents in 10^5 shards.

The source's root manifest has 100,000 shards of 100,000 documents. The index files of the shards that the window after
the cursor touches, and of three full groups at least, are real and read from the disk (dropped from the page cache
first); all other shards are simulated: they have a manifest record and no file. The cursor stands in the middle of the
source, in its second epoch.

- ``position_ms``: from the cursor to the ids of the next 8192 documents, with the manifest open and nothing packed
  (``position_with_lengths_ms``: with their lengths, from the cold index files of the group);
- ``first_batch_s``: from the cursor to the first step's packs and this rank's first micro-batches of token ids, in a
  warm process, lengths read cold;
- ``memory_mib``: growth of the process by manifest, order and cursor; ``manifest_bytes_per_shard``: on the disk.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsft.batch.collate import BatchSpec, collate
from dsft.ops import backend
from dsft.sampling.order import CHUNK_DOCUMENTS, SourceOrder
from dsft.sampling.plan import Planner
from dsft.sampling.types import Cursor, PlannedSource, SourcePosition, Stage
from dsft.store.layout import index_path, tokens_path
from dsft.store.manifest import Manifest, write_manifest
from dsft.store.reader import SourceStore, read_index_file
from dsft.store.types import Document
from dsft.store.writer import ShardWriter

NUM_SHARDS, SHARD_DOCUMENTS, GROUP_SHARDS, PACK_TOKENS, SEED = 100_000, 100_000, 16, 8192, 17
EPOCH, NUM_REAL_GROUPS = 1, 3


def make_planner(source: PlannedSource) -> Planner:
    """The planner with the defaults of the configuration."""
    return Planner(
        [source],
        [Stage("all", None, (1.0,))],
        seed=SEED,
        pack_tokens=PACK_TOKENS,
        global_batch_packs=128,
        window_documents=65_536,
        window_tokens=16_000_000,
        group_shards=GROUP_SHARDS,
        overlong="split",
        train_tokens=None,
    )


def make_order(source: PlannedSource) -> SourceOrder:
    """The source's order as the planner makes it."""
    return SourceOrder(source, seed=SEED, group_shards=GROUP_SHARDS, pack_tokens=PACK_TOKENS, overlong="split")


def write_template(folder: Path) -> None:
    """Write shard 0: short documents of random tokens. The other real shards are copies, linked on the disk."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, 0, np.uint16, "raw-000000.jsonl.zst")
    weights = np.ones(1, dtype=np.float32)
    tokens = rng.integers(0, 50_000, 4096, dtype=np.int32)
    for length in rng.lognormal(4.0, 1.0, SHARD_DOCUMENTS).clip(8, 4096).astype(int).tolist():
        writer.add(Document(tokens[:length], np.array([[0, length]], dtype=np.int32), weights, num_bytes=4 * length))
    writer.close()


def write_store(folder: Path) -> int:
    """The manifest of all shards; returns its size in bytes."""
    index = read_index_file(index_path(folder, 0))
    columns = {
        name: np.full(NUM_SHARDS, index.metadata[name], dtype=np.int64)
        for name in ("num_documents", "num_tokens", "num_targets", "num_bytes")
    }
    names = tuple(f"part-{shard:06d}.jsonl.zst" for shard in range(NUM_SHARDS))
    crc32 = np.full(NUM_SHARDS, index.crc32, dtype=np.int64)
    write_manifest(folder, Manifest("web", {}, "", "uint16", 50_000, names, index_crc32=crc32, counts={}, **columns))
    return (folder / "manifest.json").stat().st_size


def copy_shard(folder: Path, shard: int) -> None:
    """Make a shard real: its own index file, and a link to the template's tokens."""
    if not index_path(folder, shard).exists():
        index_path(folder, shard).write_bytes(index_path(folder, 0).read_bytes())
        tokens_path(folder, shard).hardlink_to(tokens_path(folder, 0))


def drop_from_page_cache(folder: Path) -> None:
    """Write the folder's files out and ask the kernel to forget them."""
    for path in folder.glob("shard-*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes() -> int:
    """Resident memory of this process that no file backs."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def planned_source(store: SourceStore) -> PlannedSource:
    """What the plan knows of the store."""
    return PlannedSource(store.name, store.num_shards, lambda shard: store.index(shard).lengths)


def middle(planner: Planner) -> Cursor:
    """A cursor at a window's start, in the middle of the source's second epoch and of a group."""
    group = NUM_SHARDS // GROUP_SHARDS // 2
    position = SourcePosition(
        epoch=EPOCH, group=group, ordinal=SHARD_DOCUMENTS * GROUP_SHARDS // 2, tokens_drawn=10**12
    )
    return replace(
        planner.start(), window=10**6, tokens_drawn=10**12, stage_tokens_drawn=(10**12,), sources=(position,)
    )


def measure_position(store: SourceStore) -> tuple[float, float]:
    """Milliseconds from the cursor to the ids of the next 8192 documents: from the counts in the open manifest, and
    with their lengths from the cold index files of the group."""
    position = middle(make_planner(planned_source(store))).sources[0]
    ordinals = np.arange(position.ordinal, position.ordinal + CHUNK_DOCUMENTS, dtype=np.int64)
    ids, lengths = [], []
    for _ in range(5):
        begin = time.perf_counter()
        order = make_order(planned_source(store))
        shard, document = order.documents_at(position.epoch, position.group, ordinals, store.manifest.num_documents)
        ids.append(1000 * (time.perf_counter() - begin))
        drop_from_page_cache(Path(store.place))
        cold = SourceStore(Path(store.place))
        begin = time.perf_counter()
        chunk = make_order(planned_source(cold)).read(position.epoch, position.group, position.ordinal)
        lengths.append(1000 * (time.perf_counter() - begin))
        assert np.array_equal(chunk.shard, shard)
        assert np.array_equal(chunk.document, document)
    return statistics.median(ids), statistics.median(lengths)


def measure_first_batch(store: SourceStore) -> float:
    """Seconds from the cursor to a rank's first micro-batches."""
    times = []
    for _ in range(3):
        drop_from_page_cache(Path(store.place))
        fresh = SourceStore(Path(store.place))
        begin = time.perf_counter()
        planner = make_planner(planned_source(fresh))
        step = next(planner.steps(middle(planner)))
        spec = BatchSpec((fresh,), (1.0,), "token", PACK_TOKENS, pad_id=0)
        collate(step.packs[:1], spec)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="six real groups instead of three")
    num_groups = NUM_REAL_GROUPS * (2 if parser.parse_args().full else 1)
    backend.choose("native")
    with tempfile.TemporaryDirectory(prefix="dsft-resume-") as name:
        folder = Path(name)
        write_template(folder)
        manifest_bytes = write_store(folder)
        before = resident_bytes()
        store = SourceStore(folder)
        planner = make_planner(planned_source(store))
        cursor = middle(planner)
        memory = resident_bytes() - before
        order = make_order(planned_source(store))
        first = cursor.sources[0].group
        for group in range(first, first + num_groups):
            for shard in order.shards_of_group(EPOCH, group).tolist():
                copy_shard(folder, shard)
        position_ms, lengths_ms = measure_position(store)
        first_batch = measure_first_batch(store)
    result = {
        "benchmark": "resume",
        "position_ms": round(position_ms, 2),
        "position_with_lengths_ms": round(lengths_ms, 2),
        "first_batch_s": round(first_batch, 3),
        "memory_mib": round(memory / 2**20, 1),
        "manifest_bytes_per_shard": round(manifest_bytes / NUM_SHARDS, 1),
        "real_shards": num_groups * GROUP_SHARDS,
        "simulated_shards": NUM_SHARDS - num_groups * GROUP_SHARDS,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What preparing raw text costs beside the tokenizer itself.

The corpus is the language reference that CPython carries, over and over, in jsonl shards; the tokenizer a BPE trained
on it. ``bare`` is the tokenizer alone (``RAYON_NUM_THREADS=1``) on the same texts in the same batches, held in memory;
``dsft`` reads, parses, encodes, checks, hashes, writes and publishes. ``fraction_of_bare`` is dsft's speed over the
bare one, by processor time of one process. ``speedup_two`` and ``bare_speedup_two`` are two processes over one, by the
clock from a common start after imports: a machine that does other work beside them shows less. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from dsft.config.models import SourceSection
from dsft.corpus.prepare import prepare_sources
from dsft.corpus.shard import _BATCH_CHARACTERS, _BATCH_SAMPLES
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.demo.corpus import language_reference
from dsft.demo.tokenizer import make_tokenizer

NUM_SHARDS, NUM_ROUNDS = 8, 3
_START_SECONDS = 120.0


def write_corpus(folder: Path, num_bytes: int) -> int:
    """Shards of about ``num_bytes`` in all; returns the bytes of text in them."""
    texts = list(language_reference().values())
    make_tokenizer(texts, folder / "tokenizer", identity="prepare")
    lines: list[list[str]] = [[] for _ in range(NUM_SHARDS)]
    written = number = 0
    while written < num_bytes:
        text = texts[number % len(texts)]
        lines[number % NUM_SHARDS].append(json.dumps({"text": text}) + "\n")
        written += len(text.encode())
        number += 1
    for shard, of_shard in enumerate(lines):
        (folder / f"part-{shard}.jsonl").write_text("".join(of_shard))
    return written


def open_tokenizer(folder: Path) -> Tokenizer:
    """The corpus's tokenizer, as a run opens it."""
    return load_tokenizer(str(folder / "tokenizer"))


def batches(folder: Path, shards: range) -> Iterator[list[str]]:
    """The shards' texts in the batches that preparation makes of them."""
    for shard in shards:
        batch: list[str] = []
        characters = 0
        for line in (folder / f"part-{shard}.jsonl").read_text().splitlines():
            batch.append(json.loads(line)["text"])
            characters += len(batch[-1])
            if len(batch) == _BATCH_SAMPLES or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch


def work(kind: str, folder: Path, worker: int, num_workers: int, start: Barrier, results: Any) -> None:
    """Body of a process: make ready; each round, wait for the others and work; report the rounds' times."""
    tokenizer = open_tokenizer(folder)
    texts = list(batches(folder, range(worker, NUM_SHARDS, num_workers))) if kind == "bare" else []
    section = SourceSection(name="reference", path=str(folder / "*.jsonl"))
    reports = []
    for number in range(NUM_ROUNDS):
        store = folder / f"store-{num_workers}-{number}"
        start.wait()
        wall, processor = time.perf_counter(), time.process_time()
        if kind == "bare":
            for batch in texts:
                tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False)
        else:
            prepare_sources([section], tokenizer, store, worker, num_workers, "error")
        reports.append((time.perf_counter() - wall, time.process_time() - processor))
    results.put(reports)


def measure(kind: str, folder: Path, num_workers: int) -> tuple[float, float]:
    """(seconds until the last process is done, processor seconds of all), each in the best round."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(num_workers, timeout=_START_SECONDS), context.Queue()
    processes = [
        context.Process(target=work, args=(kind, folder, worker, num_workers, start, results))
        for worker in range(num_workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"a process of {kind} ended with exit code {process.exitcode}")
    reports = [results.get() for _ in processes]
    rounds = list(zip(*reports, strict=True))  # of each round, every process's times
    walls = [max(wall for wall, _ in times) for times in rounds]
    processors = [sum(processor for _, processor in times) for times in rounds]
    return min(walls), min(processors)


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="24 times the text")
    num_bytes = 60_000_000 if parser.parse_args().full else 2_500_000
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes started below inherit it
    with tempfile.TemporaryDirectory(prefix="dsft-prepare-") as name:
        folder = Path(name)
        text_bytes = write_corpus(folder, num_bytes)
        times = {(kind, count): measure(kind, folder, count) for count in (1, 2) for kind in ("bare", "dsft")}
    for (kind, count), (wall, processor) in times.items():
        print(f"{kind:>5} {count} processes: {wall:6.2f} s by the clock, {processor:6.2f} s of processor time")
    result = {
        "benchmark": "prepare",
        "fraction_of_bare": round(times["bare", 1][1] / times["dsft", 1][1], 4),
        "speedup_two": round(times["dsft", 1][0] / times["dsft", 2][0], 3),
        "bare_speedup_two": round(times["bare", 1][0] / times["bare", 2][0], 3),
        "megabytes_per_second": round(text_bytes / times["dsft", 1][1] / 1e6, 3),
        "bare_megabytes_per_second": round(text_bytes / times["bare", 1][1] / 1e6, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

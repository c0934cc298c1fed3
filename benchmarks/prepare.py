"""What preparing raw text costs beside the tokenizer itself.

The corpus is the language reference that CPython carries, over and over, in jsonl shards; the tokenizer a BPE trained
on it. ``bare`` is the tokenizer alone (``RAYON_NUM_THREADS=1``) on the same texts in the same batches, held in memory;
``dsft`` reads, parses, encodes, checks, hashes, writes and publishes. ``fraction_of_bare`` is dsft's speed over the
bare one, by processor time: the median of rounds in which one process does one right after the other (in two processes
the same work differs by 3 %); ``fraction_of_ids`` is that over the bare tokenizer whose ids are read, too, without
which it has no result. ``speedup_two`` and ``bare_speedup_two`` are two processes over one, by the clock from a common
start after imports: a machine that does other work beside them shows less. ``skewed_speedup``: processor time of the
busier of two processes, over a corpus with one shard as large as half of it, when the shards are dealt in turn, over
that when each takes the largest that is free. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from dsft.config.models import SourceSection
from dsft.corpus.prepare import prepare_sources
from dsft.corpus.shard import _BATCH_CHARACTERS, _BATCH_SAMPLES
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.demo.corpus import language_reference
from dsft.demo.tokenizer import make_tokenizer

NUM_SHARDS, NUM_ROUNDS, NUM_PAIRS = 8, 3, 7
SKEWED_SHARES = (0.5, 0.0125, 0.15, 0.0125, 0.15, 0.0125, 0.15, 0.0125)
"""Of the corpus, in each shard; dealt to two processes in turn, 0.95 are the first one's."""
_START_SECONDS, _LIMIT_SECONDS = 120.0, 1800.0


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
        elif kind == "dealt":  # by hand: each process a source of its own
            own = tuple(
                str(folder / "skewed" / f"part-{shard}.jsonl") for shard in range(worker, NUM_SHARDS, num_workers)
            )
            dealt = SourceSection(name=f"dealt-{worker}", path=own)
            prepare_sources([dealt], tokenizer, store, 0, 1, "error")
        elif kind == "skewed":
            skewed = SourceSection(name="skewed", path=str(folder / "skewed"))
            prepare_sources([skewed], tokenizer, store, worker, num_workers, "error")
        else:
            prepare_sources([section], tokenizer, store, worker, num_workers, "error")
        reports.append((time.perf_counter() - wall, time.process_time() - processor))
    results.put(reports)


def pairs(folder: Path, results: Any) -> None:
    """Body of a process: each round's processor time of the bare tokenizer, of the same with its ids read, of dsft."""
    tokenizer = open_tokenizer(folder)
    texts = list(batches(folder, range(NUM_SHARDS)))
    section = SourceSection(name="reference", path=str(folder / "*.jsonl"))

    def encode() -> None:
        for batch in texts:
            tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False)

    def encode_and_read() -> None:
        for batch in texts:
            for encoding in tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False):
                _ = encoding.ids

    rounds = []
    for number in range(NUM_PAIRS):
        times = []
        for step in (encode, encode_and_read, partial(prepare, section, tokenizer, folder / f"paired-{number}")):
            began = time.process_time()
            step()
            times.append(time.process_time() - began)
        rounds.append(times)
    results.put(rounds)


def prepare(section: SourceSection, tokenizer: Tokenizer, store: Path) -> None:
    """All of dsft's work, by one worker."""
    prepare_sources([section], tokenizer, store, 0, 1, "error")


def fractions(folder: Path) -> tuple[float, float]:
    """dsft's speed over the bare tokenizer's, and over the same with its ids read: medians of the rounds."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=pairs, args=(folder, results))
    process.start()
    rounds = results.get(timeout=_LIMIT_SECONDS)
    process.join()
    of_bare = [round(bare / whole, 4) for bare, _, whole in rounds]
    print(f"fractions of bare: {sorted(of_bare)}")
    return statistics.median(of_bare), statistics.median(read / whole for _, read, whole in rounds)


def write_skewed(folder: Path) -> None:
    """The same text in other shards: the even ones have all of it but a twentieth, half of it in the first."""
    shards = [(folder / f"part-{number}.jsonl").read_text().splitlines(keepends=True) for number in range(NUM_SHARDS)]
    lines = [line for shard in shards for line in shard]
    (folder / "skewed").mkdir()
    position = 0
    for number, share in enumerate(SKEWED_SHARES):
        end = position + round(share * len(lines))
        (folder / "skewed" / f"part-{number}.jsonl").write_text("".join(lines[position:end]))
        position = end


def measure(kind: str, folder: Path, num_workers: int) -> tuple[float, float, float]:
    """Seconds until the last process is done, processor seconds of all and of the busiest, each in the best round."""
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
    busiest = [max(processor for _, processor in times) for times in rounds]
    return min(walls), min(processors), min(busiest)


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="7.5 times the text")
    num_bytes = 60_000_000 if parser.parse_args().full else 8_000_000
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes started below inherit it
    with tempfile.TemporaryDirectory(prefix="dsft-prepare-") as name:
        folder = Path(name)
        text_bytes = write_corpus(folder, num_bytes)
        of_bare, of_ids = fractions(folder)
        times = {(kind, count): measure(kind, folder, count) for count in (1, 2) for kind in ("bare", "dsft")}
        write_skewed(folder)
        times |= {(kind, 2): measure(kind, folder, 2) for kind in ("dealt", "skewed")}
    for (kind, count), (wall, processor, busiest) in times.items():
        print(
            f"{kind:>6} {count} processes: {wall:6.2f} s by the clock, {processor:6.2f} s of processor time, "
            f"{busiest:6.2f} s of the busiest"
        )
    result = {
        "benchmark": "prepare",
        "fraction_of_bare": round(of_bare, 4),
        "fraction_of_ids": round(of_ids, 4),
        "speedup_two": round(times["dsft", 1][0] / times["dsft", 2][0], 3),
        "bare_speedup_two": round(times["bare", 1][0] / times["bare", 2][0], 3),
        "skewed_speedup": round(times["dealt", 2][2] / times["skewed", 2][2], 3),
        "megabytes_per_second": round(text_bytes / times["dsft", 1][1] / 1e6, 3),
        "bare_megabytes_per_second": round(text_bytes / times["bare", 1][1] / 1e6, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

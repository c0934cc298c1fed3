"""Speed of other loaders over the tokens of ``loader.py``: run by it, in each interpreter that has some of them.

    python benchmarks/loader_peers.py FOLDER

FOLDER holds ``tokens.npy`` (uint16, all documents one after the other) and ``lengths.npy`` (int32). Each peer gets them
in its own format, on the same disk, and gives rows of ``PACK_TOKENS`` shuffled tokens as int64[1, PACK_TOKENS], in one
process without workers, which is the fastest here:

- ``datasets``: an Arrow table of documents, shuffled; rows are cut here from the documents one after the other.
- ``litdata``: its token format and ``TokensLoader``, which cuts rows from each chunk; rows are shuffled.
- ``mosaicml_streaming``: MDS samples of one row each, as its users make them for training; rows are shuffled.
- ``mosaicml_streaming_documents``: MDS samples of one document each, shuffled; rows are cut here.

Rows are cut wherever they are full, and come without positions, document borders, masks or hashes. The first pass is
not counted. Tokens per second of processor time of the process, all of its threads, median of ``NUM_PASSES`` passes.
The last line is one JSON object.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

PACK_TOKENS, SEED, NUM_PASSES = 8192, 17, 3

Ids = npt.NDArray[Any]
Rows = Callable[[], Iterator[torch.Tensor]]


def documents(folder: Path) -> Iterator[npt.NDArray[np.uint16]]:
    """The documents, in order."""
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    end = 0
    for length in np.load(folder / "lengths.npy").tolist():
        yield np.asarray(tokens[end : end + length])
        end += length


def rows_of(streams: Iterable[Ids]) -> Iterator[torch.Tensor]:
    """Documents one after the other, cut into rows: int64[1, PACK_TOKENS]."""
    waiting: list[Ids] = []
    have = 0
    for ids in streams:
        waiting.append(ids)
        have += len(ids)
        while have >= PACK_TOKENS:
            joined = np.concatenate(waiting)
            yield torch.from_numpy(joined[:PACK_TOKENS].astype(np.int64))[None]
            waiting, have = [joined[PACK_TOKENS:]], have - PACK_TOKENS


def of_datasets(folder: Path) -> Rows:
    """Hugging Face datasets: a parquet file in its cache as an Arrow table, as numpy."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    path = folder / "documents.parquet"
    ids = pyarrow.array([document.astype(np.int32) for document in documents(folder)], pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"ids": ids}), path, row_group_size=1000)
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder / "datasets")).with_format("numpy")
    return lambda: rows_of(row["ids"] for row in table.shuffle(seed=SEED))


def all_documents(folder: str) -> Iterator[Ids]:
    """What litdata's processes write."""
    yield from documents(Path(folder))


def of_litdata(folder: Path) -> Rows:
    """litdata's streaming dataset over its own chunks of tokens."""
    import litdata

    made = str(folder / "litdata")
    loader = litdata.TokensLoader(block_size=PACK_TOKENS)
    litdata.optimize(
        all_documents,
        [str(folder)],
        made,
        chunk_size=PACK_TOKENS * 512,
        num_workers=1,
        item_loader=loader,
        verbose=False,
    )
    dataset = litdata.StreamingDataset(made, item_loader=litdata.TokensLoader(PACK_TOKENS), shuffle=True, seed=SEED)
    return lambda: (torch.from_numpy(np.asarray(row).astype(np.int64))[None] for row in dataset)


def _of_mosaicml(folder: Path, samples: Iterable[Ids]) -> Any:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"ids": "ndarray:uint16"}) as writer:
        for ids in samples:
            writer.write({"ids": np.asarray(ids, dtype=np.uint16)})
    return StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=1)


def of_mosaicml_rows(folder: Path) -> Rows:
    """mosaicml-streaming over samples of one row."""
    packed = (row[0].numpy() for row in rows_of(documents(folder)))
    dataset = _of_mosaicml(folder / "mds-rows", packed)
    return lambda: (torch.from_numpy(sample["ids"].astype(np.int64))[None] for sample in dataset)


def of_mosaicml_documents(folder: Path) -> Rows:
    """mosaicml-streaming over samples of one document."""
    dataset = _of_mosaicml(folder / "mds-documents", documents(folder))
    return lambda: rows_of(sample["ids"] for sample in dataset)


PEERS: dict[str, tuple[str, str, Callable[[Path], Rows]]] = {
    "datasets": ("datasets", "datasets", of_datasets),
    "litdata": ("litdata", "litdata", of_litdata),
    "mosaicml_streaming": ("streaming", "mosaicml-streaming", of_mosaicml_rows),
    "mosaicml_streaming_documents": ("streaming", "mosaicml-streaming", of_mosaicml_documents),
}
"""Module and distribution of each peer, and what makes its rows."""


def measure(rows: Rows) -> dict[str, float]:
    """Tokens per second of passes over a peer's rows, by processor time and by the clock."""
    speeds, wall_speeds = [], []
    for _ in range(NUM_PASSES + 1):
        wall, processor = time.perf_counter(), time.process_time()
        tokens = sum(row.numel() for row in rows())
        speeds.append(tokens / (time.process_time() - processor))
        wall_speeds.append(tokens / (time.perf_counter() - wall))
    return {
        "tokens": tokens,
        "tokens_per_second": round(statistics.median(speeds[1:])),
        "tokens_per_second_wall": round(statistics.median(wall_speeds[1:])),
    }


def main() -> None:
    """Measure every peer that is installed; end with one JSON object."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name, (module, distribution, make) in PEERS.items():
        if importlib.util.find_spec(module) is not None:
            found[name] = {"version": importlib.metadata.version(distribution), **measure(make(folder))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

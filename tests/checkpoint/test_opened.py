"""Ranges of a hashed file: the right bytes, each block checked and read once, and only the blocks that are needed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dsft.checkpoint import opened
from dsft.checkpoint.opened import WINDOW_BYTES, BlockReader
from dsft.errors import DamagedCheckpointError
from dsft.fsio import BLOCK_BYTES, BlockHashedFile, block_hash

NUM_BYTES = 2 * WINDOW_BYTES + 5 * BLOCK_BYTES + 77


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    path = tmp_path_factory.mktemp("file") / "shard"
    data = np.random.default_rng(1).bytes(NUM_BYTES)
    with BlockHashedFile(path) as written:
        written.write(data)
    return path, data, bytes(written.hashes)


def read(reader: BlockReader, offset: int, num_bytes: int) -> bytes:
    return b"".join(bytes(piece) for piece in reader.pieces(offset, num_bytes))


def test_rising_ranges_check_each_block_once(file: tuple[Path, bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, data, hashes = file
    checked = []

    def counted(block: memoryview) -> bytes:
        checked.append(len(block))
        return block_hash(block)

    monkeypatch.setattr(opened, "block_hash", counted)
    cuts = sorted({0, NUM_BYTES, *np.random.default_rng(2).integers(0, NUM_BYTES, 60).tolist()})
    with BlockReader(path, NUM_BYTES, hashes) as reader:
        for begin, end in pairwise(cuts):
            assert read(reader, begin, end - begin) == data[begin:end]
    assert sum(checked) == NUM_BYTES, "every block once"


def test_only_the_blocks_of_a_range_are_looked_at(file: tuple[Path, bytes, bytes], tmp_path: Path) -> None:
    path, data, hashes = file
    damaged = bytearray(data)
    damaged[3 * BLOCK_BYTES + 5] ^= 4
    (tmp_path / "damaged").write_bytes(damaged)
    with BlockReader(tmp_path / "damaged", NUM_BYTES, hashes) as reader:
        assert read(reader, 100, 3 * BLOCK_BYTES - 100) == data[100 : 3 * BLOCK_BYTES]
        assert read(reader, 4 * BLOCK_BYTES, NUM_BYTES - 4 * BLOCK_BYTES) == data[4 * BLOCK_BYTES :]
        for offset in (3 * BLOCK_BYTES, 4 * BLOCK_BYTES - 1):  # also where the range leaves the damaged byte out
            with pytest.raises(DamagedCheckpointError, match=r"block 3 \(bytes from 196,608\)"):
                read(reader, offset, 1)
    with pytest.raises(DamagedCheckpointError, match="bytes long"):
        BlockReader(path, NUM_BYTES - 1, hashes)

"""Files appear whole or not at all, and their hashes are those of what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from dsft.errors import SaveError
from dsft.fsio import (
    BLOCK_BYTES,
    HASH_BYTES,
    BlockHashedFile,
    atomic_file,
    hash_file,
    save_error,
    write_bytes,
    write_json,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"b": 1, "a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2], "b": 1}
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.write("half" if file.write(b"half") else b"")  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"a": [1, 2], "b": 1}
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_folder_that_is_not_there_is_a_save_error(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"cannot write .*nowhere/x"):
        write_bytes(tmp_path / "nowhere" / "x", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named() -> None:
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    error = save_error(Path("/data/run"), caught.value)
    assert "/data/run" in str(error)
    assert "no space left" in str(error)
    assert error.exit_code == 74


@pytest.mark.parametrize("piece_bytes", [1000, BLOCK_BYTES, 3 * BLOCK_BYTES + 7])
def test_block_hashed_file(tmp_path: Path, piece_bytes: int) -> None:
    path = tmp_path / "payload"
    data = np.random.default_rng(0).bytes(4 * BLOCK_BYTES + 123)
    with BlockHashedFile(path) as file:
        for start in range(0, len(data), piece_bytes):
            file.write(memoryview(data)[start : start + piece_bytes])
    assert file.num_bytes == len(data)
    assert path.read_bytes() == data
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    hashes = [xxhash.xxh3_128(block).digest() for block in blocks]
    assert bytes(file.hashes) == b"".join(hashes)
    assert len(hashes[0]) == HASH_BYTES
    with pytest.raises(FileExistsError):
        BlockHashedFile(path)  # never over something that is there


def test_hash_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcdef")
    assert hash_file(tmp_path / "file") == (6, hashlib.sha256(b"abcdef").hexdigest())

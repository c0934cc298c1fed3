"""Files appear whole or not at all, and their hashes are those of what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from dsft.errors import SaveError
from dsft.fsio import HashedFile, atomic_file, hash_file, save_error, write_bytes, write_json


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


def test_hashed_file(tmp_path: Path) -> None:
    path = tmp_path / "payload"
    with HashedFile(path) as file:
        file.write(b"abc")
        file.write(memoryview(b"def"))
    assert (file.num_bytes, file.sha256) == (6, hashlib.sha256(b"abcdef").hexdigest())
    assert hash_file(path) == (6, file.sha256)
    assert path.read_bytes() == b"abcdef"
    with pytest.raises(FileExistsError):
        HashedFile(path)  # never over something that is there

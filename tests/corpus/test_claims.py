"""Workers share the shards of a source: each is made by the first that claims it, and nobody's claim outlives him."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsft.corpus.claims import claimed
from dsft.corpus.prepare import prepare_sources, store_name
from dsft.corpus.progress import no_progress
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import SaveError
from tests.corpus.test_prepare import prepare, raw_folder, source, tree

HOLD = """\
import sys, time
from pathlib import Path
from dsft.corpus.claims import claimed
with claimed(Path(sys.argv[1]), int(sys.argv[2]), is_alone=False) as is_mine:
    print(is_mine, flush=True)
    time.sleep(120)
"""


@contextmanager
def other_process(folder: Path, shard: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed a shard, and is at it."""
    command = [sys.executable, "-c", HOLD, str(folder), str(shard)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            yield process
        finally:
            process.kill()


def test_a_shard_is_claimed_once_and_free_again_when_its_worker_is_killed(tmp_path: Path) -> None:
    with other_process(tmp_path, 3) as process:
        with claimed(tmp_path, 3, is_alone=False) as is_mine, claimed(tmp_path, 4, is_alone=False) as is_mine_too:
            assert (is_mine, is_mine_too) == (False, True)
        process.kill()
        process.wait(20)
        assert [path.name for path in tmp_path.iterdir()] == [".shard-000003.claim"]
        with claimed(tmp_path, 3, is_alone=False) as is_mine:
            assert is_mine
    assert list(tmp_path.iterdir()) == []


def test_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path, 0, is_alone=False):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with claimed(tmp_path, 0, is_alone=True) as is_mine:
        assert is_mine
    with pytest.raises(SaveError, match="no locks"), claimed(tmp_path, 0, is_alone=False):
        pass


def test_a_killed_workers_shard_is_made_by_another_to_the_same_bytes(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    section = source(raw_folder(tmp_path))
    prepare([section], base_tokenizer, tmp_path / "one")
    store_dir = tmp_path / "two" / "store"
    folder = store_dir / store_name(section, base_tokenizer)
    folder.mkdir(parents=True)
    (folder / ".shard-000000.claim").touch()  # of somebody who was killed long ago
    with other_process(folder, 1) as process:
        arguments = ([section], base_tokenizer, store_dir, 0, 2, "error", no_progress)
        worker = threading.Thread(target=prepare_sources, args=arguments)
        worker.start()
        others = [folder / f"shard-{number:06d}.index" for number in (0, 2)]
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in others):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not (folder / "shard-000001.index").exists()
        process.kill()
        worker.join(60)
        assert not worker.is_alive()
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_who_has_less_to_do_takes_more(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    """While one worker is at its shard, the other makes all the rest, whatever their numbers."""
    section = source(raw_folder(tmp_path, num_shards=6))
    store_dir = tmp_path / "store"
    folder = store_dir / store_name(section, base_tokenizer)
    folder.mkdir(parents=True)
    with other_process(folder, 2):
        prepare_sources([section], base_tokenizer, store_dir, 1, 2, "error", waits=False)
        assert sorted(path.name for path in folder.glob("*.index")) == [
            f"shard-{number:06d}.index" for number in (0, 1, 3, 4, 5)
        ]

"""A cache of remote shards: right bytes or a named error, within its bound, whoever else uses it and whoever dies."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsft.errors import DamagedFileError, DataError
from dsft.store.reader import SourceStore
from tests.support.remote_store import cached_bytes, open_remote_store, serve
from tests.support.stores import text_document, write_store
from tests.support.web_server import Fault, WebServer

NUM_SHARDS = 6
SHARD_TOKENS = 40_000  # 80,000 bytes: two blocks
SECONDS = 120.0

READ_ALL = """
import sys, zlib
from pathlib import Path
from tests.support.remote_store import open_remote_store
store = open_remote_store(sys.argv[1], Path(sys.argv[2]))
print(*(zlib.crc32(store.tokens(shard).data) for shard in range(store.num_shards)))
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> SourceStore:
    rng = np.random.default_rng(2)
    documents = [text_document(rng.integers(0, 900, SHARD_TOKENS // 100)) for _ in range(100 * NUM_SHARDS)]
    return write_store(tmp_path_factory.mktemp("local") / "docs", documents, num_shards=NUM_SHARDS)


def assert_equal(store: SourceStore, local: SourceStore, shards: range = range(NUM_SHARDS)) -> None:
    assert store.fingerprint == local.fingerprint
    for shard in shards:
        np.testing.assert_array_equal(store.tokens(shard), local.tokens(shard))
        np.testing.assert_array_equal(store.index(shard).lengths, local.index(shard).lengths)


def gets_of_shards(server: WebServer) -> list[str]:
    return sorted(name.rpartition("/")[2] for name, _, _ in server.gets if "shard-" in name)


def test_each_file_is_fetched_once_for_all_who_share_the_cache(
    tmp_path: Path, server: WebServer, local: SourceStore
) -> None:
    url = serve(server, local)
    assert_equal(open_remote_store(url, tmp_path), local)
    assert_equal(open_remote_store(url, tmp_path), local)
    expected = [f"shard-{shard:06d}.{kind}" for shard in range(NUM_SHARDS) for kind in ("index", "tokens")]
    assert gets_of_shards(server) == expected


def test_two_processes_share_a_cache_at_once(tmp_path: Path, server: WebServer, local: SourceStore) -> None:
    url = serve(server, local)
    command = [sys.executable, "-c", READ_ALL, url, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert outputs[0] == outputs[1] != ""
    assert len(gets_of_shards(server)) == 2 * NUM_SHARDS, "no file was fetched by both"
    assert_equal(open_remote_store(url, tmp_path), local)


@pytest.mark.parametrize("fault", ["503", "reset", "short", "wrong"])
def test_what_fails_or_comes_wrong_is_fetched_again(
    fault: Fault, tmp_path: Path, server: WebServer, local: SourceStore
) -> None:
    store = open_remote_store(serve(server, local), tmp_path)
    server.faults.extend([fault, "none", fault, "none"])
    assert_equal(store, local)
    assert len(gets_of_shards(server)) == 2 * NUM_SHARDS + 2


@pytest.mark.parametrize(("good", "name"), [(0, "index"), (1, "tokens")])
def test_what_is_wrong_where_it_lies_is_refused_by_name(
    good: int, name: str, tmp_path: Path, server: WebServer, local: SourceStore
) -> None:
    store = open_remote_store(serve(server, local), tmp_path)
    server.faults.extend(["none"] * good + ["wrong"] * 2)
    with pytest.raises(DamagedFileError, match=rf"docs/shard-000003\.{name}.* copy the prepared folder there again"):
        store.tokens(3)
    assert len(gets_of_shards(server)) == good + 2
    assert_equal(store, local)


def test_a_file_of_another_size_is_refused(tmp_path: Path, server: WebServer, local: SourceStore) -> None:
    store = open_remote_store(serve(server, local), tmp_path)
    server.files["docs/shard-000001.tokens"] += b"more"
    with pytest.raises(
        DataError, match=r"shard-000001\.tokens has 80004 bytes and the store's manifest.json describes"
    ):
        store.tokens(1)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_what_is_damaged_in_the_cache_is_fetched_again(
    damage: str, tmp_path: Path, server: WebServer, local: SourceStore, caplog: pytest.LogCaptureFixture
) -> None:
    url = serve(server, local)
    assert_equal(open_remote_store(url, tmp_path), local)
    for path in (tmp_path / "files").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.unlink()  # a map may be open of the old one
        path.write_bytes({"flipped": bytes(data), "cut": data[: len(data) // 2], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert_equal(open_remote_store(url, tmp_path), local)
    assert len(gets_of_shards(server)) == 4 * NUM_SHARDS
    assert "fetched again" in caplog.text


def test_killed_in_the_middle_of_a_file_it_leaves_nothing_that_counts(
    tmp_path: Path, server: WebServer, local: SourceStore
) -> None:
    url = serve(server, local)
    server.faults.extend(["none", "none", "none", "stall"])  # manifest, index, tokens, index
    process = subprocess.Popen([sys.executable, "-c", READ_ALL, url, str(tmp_path)])
    try:
        end = time.monotonic() + SECONDS
        while len(server.gets) < 4:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (left,) = [path for path in (tmp_path / "files").iterdir() if path.name.startswith(".")]
    assert_equal(open_remote_store(url, tmp_path), local)
    assert not left.exists()
    names = gets_of_shards(server)
    assert len(names) == 2 * NUM_SHARDS + 1
    assert names.count("shard-000001.index") == 2


def test_the_least_recently_used_makes_room_and_what_is_in_use_stays(
    tmp_path: Path, server: WebServer, local: SourceStore
) -> None:
    url, bound = serve(server, local), 4 * 90_000
    holder = open_remote_store(url, tmp_path, 10**9)
    held = holder.tokens(0)
    reader = open_remote_store(url, tmp_path, bound)
    for shard in range(1, NUM_SHARDS):
        np.testing.assert_array_equal(reader.tokens(shard), local.tokens(shard))
        assert cached_bytes(tmp_path) <= bound
    np.testing.assert_array_equal(held, local.tokens(0))
    server.gets.clear()
    assert_equal(open_remote_store(url, tmp_path), local, range(1))
    assert gets_of_shards(server) == [], "the first shard was in use and is still here"
    assert_equal(open_remote_store(url, tmp_path), local, range(1, 2))
    assert "shard-000001.tokens" in gets_of_shards(server), "the oldest that was not in use is gone"


def test_what_is_in_use_may_be_more_than_the_bound_and_it_says_so(
    tmp_path: Path, server: WebServer, local: SourceStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_remote_store(serve(server, local), tmp_path, 100_000)
    first = store.tokens(0)
    with caplog.at_level(logging.WARNING):
        second = store.tokens(1)
    np.testing.assert_array_equal(np.concatenate([first, second]), np.concatenate([local.tokens(0), local.tokens(1)]))
    assert "more than data.cache_bytes (100000) for files that are in use" in caplog.text


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that three shards fit into."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_used_for_what_is_needed_now(disk: Path, server: WebServer, local: SourceStore) -> None:
    url = serve(server, local)
    for shard in range(NUM_SHARDS):
        assert_equal(open_remote_store(url, disk), local, range(shard, shard + 1))
        gc.collect()  # what the store had mapped is no longer in use
    store = open_remote_store(url, disk)
    with pytest.raises(DataError, match=r"docs/shard-00000\d\.\w+ cannot be kept in the cache .*No space left"):
        assert_equal(store, local)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, server: WebServer, local: SourceStore) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache .*file/cache cannot be used: .* data.cache_dir"):
        open_remote_store(serve(server, local), tmp_path / "file" / "cache")


def test_what_will_be_needed_is_fetched_ahead_as_far_as_it_fits(
    tmp_path: Path, server: WebServer, local: SourceStore
) -> None:
    store = open_remote_store(serve(server, local), tmp_path, 260_000)
    store.files.will_need([4, 2, 5, 0])
    wanted = [f"shard-{shard:06d}.{kind}" for shard in (2, 4, 5) for kind in ("index", "tokens")]
    end = time.monotonic() + SECONDS
    while gets_of_shards(server) != wanted:
        assert time.monotonic() < end, gets_of_shards(server)
        time.sleep(0.02)
    for shard in (2, 4, 5):
        np.testing.assert_array_equal(store.tokens(shard), local.tokens(shard))
    assert gets_of_shards(server) == wanted


def test_what_cannot_be_fetched_ahead_is_an_error_only_where_it_is_needed(
    tmp_path: Path, server: WebServer, local: SourceStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_remote_store(serve(server, local), tmp_path)
    del server.files["docs/shard-000003.tokens"]
    with caplog.at_level(logging.WARNING):
        store.files.will_need([3])
        end = time.monotonic() + SECONDS
        while "asked for again" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert_equal(store, local, range(3))
    with pytest.raises(DataError, match=r"shard-000003\.tokens cannot be read: there is no such file"):
        store.tokens(3)

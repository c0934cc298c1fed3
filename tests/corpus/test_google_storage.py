"""Sources at gs://, through gcsfs, from an emulator's server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft import remote
from dsft.corpus.listing import list_shards
from dsft.corpus.sources import read_records
from dsft.errors import DamagedFileError, DataError
from tests.corpus.test_sources import JSONL, ROWS, WRITERS
from tests.support.gcs_server import gcs_server
from tests.support.web_server import Fault, web_server
from tests.test_remote import names, values


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """A client of the running server."""
    with gcs_server("corpus"):
        import gcsfs

        yield gcsfs.GCSFileSystem(token="anon")


@pytest.mark.parametrize("kind", ["jsonl", "zstd", "parquet", "arrow stream"])
def test_every_kind_of_file_gives_the_same_rows(
    kind: str, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    path = WRITERS[kind](tmp_path)
    store.pipe(f"corpus/kinds/{path.name}", path.read_bytes())
    assert values(f"gs://corpus/kinds/{path.name}") == ROWS


def test_folders_globs_and_what_is_not_there(store: Any) -> None:
    for name in ("b.jsonl", "a.jsonl", "e/c.jsonl.gz", "notes.md"):
        store.pipe(f"corpus/names/{name}", JSONL)
    assert names("gs://corpus/names") == names("gs://corpus/names/") == ["a.jsonl", "b.jsonl", "e/c.jsonl.gz"]
    assert names("gs://corpus/names/*.jsonl") == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="there is no such file or folder"):
        names("gs://corpus/names/none.jsonl")


def test_an_object_that_is_replaced_while_it_is_read(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    store.pipe("corpus/change/a.jsonl", JSONL)
    (shard,) = list_shards("s", "gs://corpus/change/a.jsonl")
    records = read_records(shard)
    next(records)
    store.pipe("corpus/change/a.jsonl", JSONL.replace(b"row 699", b"ROW 699"))
    with pytest.raises(DamagedFileError, match="was changed while it was read"):
        list(records)


@pytest.mark.parametrize("fault", ["503", "reset", "short"])
def test_a_request_that_fails_is_repeated(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *result: sleep(0, *result))  # gcsfs's own pauses
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    data = os.urandom(10_000)
    about = {"kind": "storage#object", "name": "a.jsonl", "bucket": "bucket", "size": str(len(data)), "generation": "1"}
    with web_server() as server:  # answers gcsfs's requests for one object
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url().rstrip("/"))
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()  # it keeps the client of another server
        times = {"updated": "2026-01-01T00:00:00.000000Z", "timeCreated": "2026-01-01T00:00:00.000000Z"}
        server.files = {"storage/v1/b/bucket/o/a.jsonl": json.dumps(about | times).encode()}
        for path in ("storage", "download/storage"):
            server.files[f"{path}/v1/b/bucket/o/a.jsonl?alt=media"] = data
        server.faults.extend(["none", fault, fault])
        with remote.open_remote("gs://bucket/a.jsonl", len(data)) as stream:
            assert stream.read() == data
        assert len(server.gets) >= 4
        server.gets.clear()
        server.faults.extend([fault] * 40)
        with (
            pytest.raises(DataError, match=r"gs://bucket/a\.jsonl cannot be read: .* 2 attempts in .* failed"),
            remote.open_remote("gs://bucket/a.jsonl", len(data)) as stream,
        ):
            stream.read()
        assert len(server.gets) == 12

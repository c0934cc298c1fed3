"""Remote files through the real client libraries: a server that fails in every way a network can, and a real S3."""

from __future__ import annotations

import gzip
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from dsft import remote
from dsft.corpus.listing import list_shards, listing_fingerprint
from dsft.corpus.sources import read_records
from dsft.errors import DamagedFileError, DataError
from tests.corpus.test_sources import JSONL, ROWS, WRITERS
from tests.support.object_store import ENVIRONMENT
from tests.support.web_server import Fault, WebServer, web_server

BLOCK = 4096


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    with web_server() as running:
        yield running


@pytest.fixture
def server_as_s3(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """The same server, which answers an S3 client's requests for an object as well."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url(), "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the client of another server
    server.files = {"bucket/a.jsonl": JSONL}
    return server


def values(path: str) -> list[object]:
    return [record.value for shard in list_shards("s", path) for record in read_records(shard)]


def names(path: str | list[str]) -> list[str]:
    return [shard.name for shard in list_shards("s", path)]


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "datasets"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path, server: WebServer) -> None:
    path = WRITERS[kind](tmp_path)
    server.files = {f"data/{path.name}": path.read_bytes()}
    assert values(server.url(f"data/{path.name}")) == ROWS


def test_a_file_is_read_block_by_block_and_each_once(server: WebServer) -> None:
    server.files = {"a.jsonl": JSONL}
    assert values(server.url("a.jsonl")) == ROWS
    borders = [*range(0, len(JSONL), BLOCK), len(JSONL)]
    assert server.gets == [("a.jsonl", start, end) for start, end in itertools.pairwise(borders)]


@pytest.mark.parametrize("fault", ["503", "reset", "stall", "short"])
def test_a_request_that_fails_is_repeated(fault: Fault, server: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    server.files = {"a.jsonl": JSONL}
    server.faults.extend(["none", fault, fault, "none", fault])
    with caplog.at_level(logging.WARNING):
        assert values(server.url("a.jsonl")) == ROWS
    starts = [start for _, start, _ in server.gets]
    assert starts[:6] == [0, BLOCK, BLOCK, BLOCK, 2 * BLOCK, 2 * BLOCK]
    assert "attempt 2 of 6" in caplog.text


@pytest.mark.parametrize("fault", ["503", "reset", "stall", "short"])
def test_a_request_that_always_fails_is_a_named_error(fault: Fault, server: WebServer) -> None:
    server.files = {"a.jsonl": JSONL}
    server.faults.extend([fault] * 20)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: .* 6 attempts in .* failed"):
        values(server.url("a.jsonl"))
    assert len(server.gets) == 6


@pytest.mark.parametrize("fault", ["503", "reset", "stall", "short"])
def test_an_s3_request_that_fails_is_repeated_too(fault: Fault, server_as_s3: WebServer) -> None:
    server_as_s3.faults.extend(["none", fault, fault])
    with remote.open_remote("s3://bucket/a.jsonl", len(JSONL)) as stream:
        assert stream.read() == JSONL
    assert [start for _, start, _ in server_as_s3.gets][:4] == [0, BLOCK, BLOCK, BLOCK]
    server_as_s3.gets.clear()
    server_as_s3.faults.extend([fault] * 20)
    with (
        pytest.raises(DataError, match=r"a\.jsonl cannot be read: .* 6 attempts in .* failed") as caught,
        remote.open_remote("s3://bucket/a.jsonl", len(JSONL)) as stream,
    ):
        stream.read()
    assert len(server_as_s3.gets) == 6
    assert all(secret not in str(caught.value) for secret in ENVIRONMENT.values())


def test_s3_access_that_is_denied_is_named_at_once(server_as_s3: WebServer) -> None:
    server_as_s3.faults.extend(["403"] * 20)
    with (
        pytest.raises(DataError, match="access is denied; check the credentials in the environment"),
        remote.open_remote("s3://bucket/a.jsonl", len(JSONL)) as stream,
    ):
        stream.read()
    assert len(server_as_s3.gets) == 1


def test_a_file_that_is_gone_is_not_asked_for_again(server: WebServer) -> None:
    server.files = {"a.jsonl": JSONL}
    server.faults.extend(["404"] * 20)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: there is no such file"):
        values(server.url("a.jsonl"))
    assert len(server.gets) == 1
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: there is no such file"):
        list_shards("s", server.url("b.jsonl"))


def test_a_file_that_changes_while_it_is_read_is_an_error(server: WebServer) -> None:
    server.files = {"a.jsonl": JSONL}

    def change() -> None:
        server.files["a.jsonl"] = JSONL.replace(b"row 699", b"ROW 699")

    server.faults.extend(["none", change])
    with pytest.raises(DamagedFileError, match=r"a\.jsonl was changed while it was read"):
        values(server.url("a.jsonl"))


def test_wrong_bytes_of_a_compressed_file_are_noticed(server: WebServer) -> None:
    server.files = {"a.jsonl.gz": gzip.compress(JSONL)}
    server.faults.append("wrong")
    with pytest.raises(DamagedFileError, match=r"a\.jsonl\.gz is cut short or damaged"):
        values(server.url("a.jsonl.gz"))


@pytest.mark.parametrize("says_so", [False, True])
def test_a_server_without_ranges_serves_what_fits_a_block(says_so: bool, server: WebServer) -> None:
    server.ranges, server.says_no_ranges = False, says_so
    server.files = {"small.jsonl": b'{"text": "x"}\n', "large.jsonl": JSONL}
    if not says_so:
        assert values(server.url("small.jsonl")) == [{"text": "x"}]
    with pytest.raises(DataError, match=r"large\.jsonl cannot be read: the server does not answer requests for a part"):
        values(server.url("large.jsonl"))


def test_index_pages_are_folders_and_globs(server: WebServer) -> None:
    server.files = dict.fromkeys(["d/b.jsonl", "d/a.jsonl", "d/e/c.jsonl.gz", "d/notes.md"], JSONL)
    assert names(server.url("d/")) == ["a.jsonl", "b.jsonl", "e/c.jsonl.gz"]
    assert names(server.url("d/*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert names([server.url("d/b.jsonl"), server.url("d/a.jsonl")]) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="named twice"):
        names([server.url("d/b.jsonl"), server.url("d/")])


def test_the_listing_follows_the_etag(server: WebServer) -> None:
    server.files = {"a.jsonl": JSONL}
    first = listing_fingerprint(list_shards("s", server.url("a.jsonl")))
    assert first == listing_fingerprint(list_shards("s", server.url("a.jsonl")))
    server.files = {"a.jsonl": JSONL.replace(b"row 1 ", b"ROW 1 ")}
    assert first != listing_fingerprint(list_shards("s", server.url("a.jsonl")))


def test_bytes_that_are_not_json_are_named_by_url_and_line(server: WebServer) -> None:
    server.files = {"a.jsonl": b'{"text": "x"}\n{"text": \n'}
    (shard,) = list_shards("s", server.url("a.jsonl"))
    _, bad = read_records(shard)
    assert bad.location == server.url("a.jsonl:2")
    assert "not valid JSON" in str(bad.value)

"""Sources in a real S3 (moto's server in a process of its own), prepared as from a local folder."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft import remote
from dsft.config.models import SourceSection
from dsft.corpus.listing import list_shards, listing_fingerprint
from dsft.corpus.sources import read_records
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DamagedFileError, DataError
from tests.corpus.test_prepare import TEXTS, documents, prepare, raw_folder, source
from tests.corpus.test_sources import JSONL, ROWS, WRITERS
from tests.support.object_store import ENVIRONMENT, s3_server
from tests.support.web_server import WebServer, web_server
from tests.test_remote import values


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A botocore client of the running server: not the library that is tested."""
    import botocore.session

    with s3_server(tmp_path_factory.mktemp("s3") / "server.log") as environment:
        client = botocore.session.get_session().create_client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
        client.create_bucket(Bucket="corpus")
        yield client


def remote_source(path: str, **keys: Any) -> SourceSection:
    return SourceSection(name="docs", path=path, **keys)


@pytest.mark.parametrize("kind", ["jsonl", "zstd", "parquet", "arrow stream"])
def test_every_kind_of_file_gives_the_same_rows(
    kind: str, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    path = WRITERS[kind](tmp_path)
    store.put_object(Bucket="corpus", Key=f"kinds/{path.name}", Body=path.read_bytes())
    assert values(f"s3://corpus/kinds/{path.name}") == ROWS


def test_folders_globs_and_what_is_not_there(store: Any) -> None:
    for name in ("b.jsonl", "a.jsonl", "e/c.jsonl.gz", "notes.md"):
        store.put_object(Bucket="corpus", Key=f"names/{name}", Body=JSONL)

    def names(path: str) -> list[str]:
        return [shard.name for shard in list_shards("s", path)]

    assert names("s3://corpus/names") == names("s3://corpus/names/") == ["a.jsonl", "b.jsonl", "e/c.jsonl.gz"]
    assert names("s3://corpus/names/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("s3://corpus/names/**/*.gz") == ["e/c.jsonl.gz"]
    assert names("s3://corpus/names/b.jsonl") == ["b.jsonl"]
    for path in ("s3://corpus/names/none.jsonl", "s3://nobucket/a.jsonl"):
        with pytest.raises(DataError, match=r"there is no such file or folder"):
            names(path)
    with pytest.raises(DataError, match="holds no file of a known kind"):
        names("s3://corpus/names/*.parquet")


def test_an_object_that_is_replaced_while_it_is_read(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    store.put_object(Bucket="corpus", Key="change/a.jsonl", Body=JSONL)
    (shard,) = list_shards("s", "s3://corpus/change/a.jsonl")
    records = read_records(shard)
    next(records)
    store.put_object(Bucket="corpus", Key="change/a.jsonl", Body=JSONL.replace(b"row 699", b"ROW 699"))
    with pytest.raises(DamagedFileError, match=r"a\.jsonl was changed while it was read"):
        list(records)
    assert listing_fingerprint([shard]) != listing_fingerprint(list_shards("s", "s3://corpus/change/a.jsonl"))


def test_a_store_from_s3_is_that_from_the_local_files(
    tmp_path: Path, store: Any, base_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    raw = raw_folder(tmp_path)
    for file in raw.iterdir():
        store.put_object(Bucket="corpus", Key=f"raw/{file.name}", Body=file.read_bytes())
    with caplog.at_level(logging.DEBUG):
        (local,) = prepare([source(raw)], base_tokenizer, tmp_path)
        (of_s3,) = prepare([remote_source("s3://corpus/raw/*.jsonl")], base_tokenizer, tmp_path / "s3")
    assert documents(of_s3) == documents(local)
    assert of_s3.fingerprint == local.fingerprint
    assert of_s3.manifest.raw_names == local.manifest.raw_names
    written = b"".join(path.read_bytes() for path in (tmp_path / "s3").rglob("*") if path.is_file())
    for secret in ENVIRONMENT.values():
        assert secret.encode() not in written
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in caplog.text


def prepare_command(folder: Path, tokenizer: str, url: str) -> list[str]:
    """The command that prepares a source into ``folder / "store"``."""
    config = {
        "run": {"name": "r", "dir": str(folder / "run")},
        "model": {"config": {"model_type": "llama"}, "tokenizer": tokenizer},
        "data": {"pack_tokens": 64, "store_dir": str(folder / "store"), "sources": [{"name": "docs", "path": url}]},
        "train": {"steps": 1, "global_batch_packs": 1, "lr": 1e-3},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    return [sys.executable, "-m", "dsft", "prepare", str(folder / "run.yaml")]


def test_two_processes_prepare_from_s3(
    tmp_path: Path, store: Any, tokenizer_folders: dict[str, str], base_tokenizer: Tokenizer
) -> None:
    raw = raw_folder(tmp_path)
    for file in raw.iterdir():
        store.put_object(Bucket="corpus", Key=f"two/{file.name}", Body=file.read_bytes())
    command = [*prepare_command(tmp_path, tokenizer_folders["sentencepiece"], "s3://corpus/two"), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ.copy(), check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "store").iterdir()
    (local,) = prepare([source(raw)], base_tokenizer, tmp_path / "local")
    assert json.loads((folder / "manifest.json").read_bytes())["fingerprint"] == local.fingerprint
    assert all(value not in done.stdout + done.stderr for value in ENVIRONMENT.values())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    with web_server() as running:
        yield running


def test_a_shard_that_came_damaged_is_read_once_more(
    tmp_path: Path, server: WebServer, base_tokenizer: Tokenizer
) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    server.files = {"a.jsonl.gz": gzip.compress(rows)}
    server.faults.append("wrong")
    lines: list[str] = []
    (found,) = prepare([remote_source(server.url("a.jsonl.gz"))], base_tokenizer, tmp_path, lines=lines)
    assert found.manifest.num_documents.sum() == len(TEXTS)
    assert any("damaged" in line and "once more" in line for line in lines)
    server.faults.extend(["wrong"] * 2)
    with pytest.raises(DamagedFileError, match=r"a\.jsonl\.gz is cut short or damaged"):
        prepare([remote_source(server.url("a.jsonl.gz"))], base_tokenizer, tmp_path / "again")


def test_killed_while_it_reads_a_shard_it_goes_on_there(
    tmp_path: Path, server: WebServer, tokenizer_folders: dict[str, str], base_tokenizer: Tokenizer
) -> None:
    raw = raw_folder(tmp_path)
    server.files = {file.name: file.read_bytes() for file in raw.iterdir()}
    server.faults.extend(["none", "stall"])
    url = server.url()
    process = subprocess.Popen(prepare_command(tmp_path, tokenizer_folders["sentencepiece"], url))
    try:
        end = time.monotonic() + 200
        while len(server.gets) < 2:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert [name for name, _, _ in server.gets] == ["0.jsonl", "1.jsonl"]
    (resumed,) = prepare([remote_source(url)], base_tokenizer, tmp_path)
    assert [name for name, _, _ in server.gets[2:]] == ["1.jsonl", "2.jsonl"], "the first shard is kept"
    (local,) = prepare([source(raw)], base_tokenizer, tmp_path / "local")
    assert resumed.fingerprint == local.fingerprint
    assert documents(resumed) == documents(local)

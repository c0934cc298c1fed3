"""Datasets of the hub through the real clients, from a server on loopback that speaks the hub's interface."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from dsft import remote
from dsft.corpus import hub
from dsft.corpus.listing import list_shards, listing_fingerprint
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DamagedFileError, DataError
from tests.corpus.test_object_store import prepare_command, remote_source
from tests.corpus.test_prepare import TEXTS, documents, prepare, raw_folder, source
from tests.corpus.test_sources import JSONL, ROWS
from tests.support.hub_server import HubServer, connect, hub_server
from tests.support.web_server import Fault
from tests.test_remote import values

CARD = b"""---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train-*}
  - {split: test, path: en/test.*}
- config_name: de
  data_files: de/*
---
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    hub._streamed.cache_clear()
    with hub_server() as running:
        connect(running, tmp_path / "cache", monkeypatch)
        yield running


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=200)
    return buffer.getvalue()


def csv_file(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["text", "id"])
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


WRITERS = {
    "parquet": parquet,
    "jsonl": lines,
    "jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "json": lambda rows: json.dumps(rows).encode(),
    "json.gz": lambda rows: gzip.compress(lines(rows)),
    "csv": csv_file,
}


def names(path: str) -> list[str]:
    return [shard.name for shard in list_shards("s", path)]


@pytest.mark.parametrize("kind", WRITERS)
def test_configurations_and_splits_of_every_kind_give_their_rows(kind: str, server: HubServer) -> None:
    write = WRITERS[kind]
    parts = {"en/train-0": ROWS[:300], "en/train-1": ROWS[300:500], "en/test": ROWS[500:600], "de/all": ROWS[600:]}
    commit = server.commit("o/n", {"README.md": CARD, **{f"{name}.{kind}": write(parts[name]) for name in parts}})
    url = f"hub://o/n@{commit}"
    assert values(f"{url}/en/train") == ROWS[:500]
    assert len(names(f"{url}/en/train")) == 2
    assert values(f"{url}/en/test") == ROWS[500:600]
    assert values(f"{url}/de/train") == ROWS[600:]


def test_the_shards_are_the_datasets_own(server: HubServer) -> None:
    commit = server.commit("o/n", {f"data/train-{number}.csv": csv_file(ROWS[number::3]) for number in range(3)})
    shards = list_shards("s", f"hub://o/n@{commit}/default/train")
    assert [shard.name for shard in shards] == [f"default/train/00000{number}-of-000003" for number in range(3)]
    assert [shard.num_bytes for shard in shards] == [len(csv_file(ROWS[number::3])) for number in range(3)]
    whole = datasets.load_dataset("o/n", revision=commit, split="train", streaming=True)
    assert whole.num_shards == 3
    for number, shard in enumerate(shards):
        found = [record.value for record in hub_records(shard)]
        assert found == list(whole.shard(3, number)) == ROWS[number::3]


def hub_records(shard: Any) -> list[Any]:
    from dsft.corpus.sources import read_records

    return list(read_records(shard))


def test_json_lines_are_read_without_the_types_that_datasets_infers(server: HubServer) -> None:
    rows = [{"text": "a", "call": {"x": 1, "on": "2020-01-01"}}, {"text": "b", "call": {"x": 1.5, "on": "2020-01-02"}}]
    commit = server.commit("o/n", {"train.jsonl": lines(rows)})
    assert values(f"hub://o/n@{commit}/default/train") == rows
    (first, _) = datasets.load_dataset("o/n", revision=commit, split="train", streaming=True)
    assert first != rows[0]  # why


def test_a_number_among_texts_puts_no_quotes_around_its_neighbours(server: HubServer) -> None:
    commit = server.commit("o/n", {"a.json": lines([{"text": "a"}]), "b.json": lines([{"text": "z"}, {"text": 3}])})
    with pytest.raises(DamagedFileError, match=r"000001-of-000002 cannot be read after row 0 by datasets: .*string"):
        values(f"hub://o/n@{commit}/default/train")


def test_only_the_columns_asked_for_are_read(server: HubServer) -> None:
    commit = server.commit("o/n", {"train.json": lines(ROWS)})
    (shard,) = list_shards("s", f"hub://o/n@{commit}/default/train")
    (file,) = shard.files
    assert list(hub.read_dataset_shard(file, ["text"])) == [{"text": row["text"]} for row in ROWS]
    assert list(hub.read_dataset_shard(file, ["absent"])) == ROWS  # so that the error can name the fields there are


def test_what_is_not_named_is_asked_for_with_all_there_is(server: HubServer) -> None:
    commit = server.commit("o/n", {"README.md": CARD, "en/train-0.csv": b"text\na\n", "en/test.csv": b"text\nb\n"})
    choices = f"hub://o/n@{commit}/en/train, hub://o/n@{commit}/en/test"
    for path in ("hub://o/n/en", "hub://o/n@main/en/train", f"hub://o/n@{commit}/en"):
        with pytest.raises(DataError, match="names no commit, configuration and split") as caught:
            names(path)
        assert choices in str(caught.value)
    with pytest.raises(DataError, match=r"there is no split dev; the splits of en are train, test"):
        names(f"hub://o/n@{commit}/en/dev")
    with pytest.raises(DataError, match=r"BuilderConfig 'fr' not found. Available: \['en', 'de'\]"):
        names(f"hub://o/n@{commit}/fr/train")
    for path in ("hub://o/m", f"hub://o/m@{commit}/en/train", f"hub://o/n@{'0' * 40}/en/train"):
        with pytest.raises(DataError, match="there is no such file or folder"):
            names(path)


def test_code_of_a_dataset_is_not_run(server: HubServer) -> None:
    commit = server.commit("o/n", {"n.py": b"raise SystemExit(1)", "README.md": b"x"})
    with pytest.raises(DataError, match=r"Dataset scripts are no longer supported, but found n\.py"):
        names(f"hub://o/n@{commit}/default/train")


def test_a_branch_that_moves_changes_nothing(server: HubServer) -> None:
    first = server.commit("o/n", {"train.csv": csv_file(ROWS[:5])})
    listing = listing_fingerprint(list_shards("s", f"hub://o/n@{first}/default/train"))
    second = server.commit("o/n", {"train.csv": csv_file(ROWS[:6])})
    assert values(f"hub://o/n@{first}/default/train") == ROWS[:5]
    assert listing_fingerprint(list_shards("s", f"hub://o/n@{first}/default/train")) == listing
    assert listing_fingerprint(list_shards("s", f"hub://o/n@{second}/default/train")) != listing


def test_the_raw_files_of_a_repository_by_hf(server: HubServer) -> None:
    commit = server.commit("o/n", {"d/a.parquet": parquet(ROWS[:400]), "d/b.jsonl": lines(ROWS[400:]), "x.md": b""})
    for url in (f"hf://datasets/o/n@{commit}/d", "hf://datasets/o/n/d", "hf://datasets/o/n@main/d/*"):
        assert values(url) == ROWS
    with pytest.raises(DataError, match="there is no such file or folder"):
        names("hf://datasets/o/n/e.jsonl")


@pytest.mark.parametrize("fault", ["503", "reset", "stall", "short"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_request_that_fails_is_repeated(
    fault: Fault, name: str, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 2)
    commit = server.commit("o/n", {name: JSONL if name.endswith("jsonl") else csv_file(ROWS)})
    shards = list_shards("s", f"hub://o/n@{commit}/default/train")
    server.faults.extend([fault, fault])
    before = len(server.gets)
    assert [record.value for shard in shards for record in hub_records(shard)] == ROWS
    assert len(server.gets) >= before + 3
    server.faults.extend([fault] * 60)
    with pytest.raises(DataError, match=r"cannot be read"):
        [record for shard in shards for record in hub_records(shard)]


def test_wrong_bytes_are_damage_and_read_once_more(
    server: HubServer, base_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    commit = server.commit("o/n", {"a.json.gz": gzip.compress(lines([{"text": text} for text in TEXTS]))})
    said: list[str] = []
    list_shards("s", f"hub://o/n@{commit}/default/train")
    server.faults.append("wrong")
    (found,) = prepare([remote_source(f"hub://o/n@{commit}/default/train")], base_tokenizer, tmp_path, lines=said)
    assert found.manifest.num_documents.sum() == len(TEXTS)
    assert any("once more" in line for line in said)


def test_a_store_from_the_hub_is_that_from_the_local_files(
    tmp_path: Path, server: HubServer, tokenizer_folders: dict[str, str], base_tokenizer: Tokenizer
) -> None:
    raw = raw_folder(tmp_path)
    (local,) = prepare([source(raw)], base_tokenizer, tmp_path / "local")
    for kind in ("jsonl", "csv"):
        rows = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in raw.iterdir()}
        files = {f"train-{name}.{kind}": WRITERS[kind]([row | {"id": 0} for row in rows[name]]) for name in rows}
        url = f"hub://o/n@{server.commit('o/n', files)}/default/train"
        (here,) = prepare([remote_source(url)], base_tokenizer, tmp_path / kind)
        assert documents(here) == documents(local)
    environment = {**os.environ, "HF_ENDPOINT": server.url().rstrip("/"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "home")}
    command = prepare_command(tmp_path, tokenizer_folders["sentencepiece"], url)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "store").iterdir()
    assert json.loads((folder / "manifest.json").read_bytes())["fingerprint"] == local.fingerprint

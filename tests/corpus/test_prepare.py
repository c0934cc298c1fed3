from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
import pytest

from dsft.config.evaluation import EvaluationSetSection
from dsft.config.models import SourceSection
from dsft.corpus.claims import claimed
from dsft.corpus.notes import FailureNotes
from dsft.corpus.prepare import prepare_sources, store_name
from dsft.corpus.preview import preview_source
from dsft.corpus.progress import PrepareProgress
from dsft.corpus.statistics import source_statistics
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.corpus.workers import prepare_with_workers
from dsft.errors import DataError, DsftError, SaveError
from dsft.store.reader import SourceStore, verify_shard
from tests.support.ranks import REPOSITORY

TEXTS = [topics[name] for name in sorted(topics)[:12]]


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def raw_folder(tmp_path: Path, num_shards: int = 3) -> Path:
    for shard in range(num_shards):
        write_jsonl(tmp_path / "raw" / f"{shard}.jsonl", [{"text": text} for text in TEXTS[shard::num_shards]])
    return tmp_path / "raw"


def source(path: Path, name: str = "docs", **keys: Any) -> SourceSection:
    return SourceSection(name=name, path=str(path), **keys)


def prepare(
    sections: Sequence[SourceSection | EvaluationSetSection],
    tokenizer: Tokenizer,
    tmp_path: Path,
    bad_records: Literal["error", "skip"] = "error",
    lines: list[str] | None = None,
    worker: int = 0,
    num_workers: int = 1,
) -> list[SourceStore]:
    def progress(report: PrepareProgress) -> None:
        if lines is not None and report.line:
            lines.append(report.line)

    folders = prepare_sources(sections, tokenizer, tmp_path / "store", worker, num_workers, bad_records, progress)
    return [SourceStore(folder) for folder in folders]


def documents(store: SourceStore) -> list[list[int]]:
    found = []
    for shard in range(store.num_shards):
        index, tokens = store.index(shard), store.tokens(shard)
        verify_shard(store, shard)
        borders = zip(index.token_offsets[:-1], index.token_offsets[1:], strict=True)
        found += [tokens[start:end].tolist() for start, end in borders]
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_documents_are_the_plain_encoding_and_an_end(tmp_path: Path, any_tokenizer: Tokenizer) -> None:
    (store,) = prepare([source(raw_folder(tmp_path))], any_tokenizer, tmp_path)
    ordered = [text for shard in range(3) for text in TEXTS[shard::3]]
    hf = any_tokenizer.hf
    assert documents(store) == [[*hf.encode(text), hf.eos_token_id] for text in ordered]
    index = store.index(0)
    np.testing.assert_array_equal(index.spans[:, 1], index.lengths)
    assert index.num_bytes.tolist() == [len(text.encode()) for text in TEXTS[0::3]]
    assert store.name == "docs"
    assert store.manifest.raw_names == ("0.jsonl", "1.jsonl", "2.jsonl")


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    sections = [
        source(raw_folder(tmp_path)),
        EvaluationSetSection(name="held", path=str(tmp_path / "raw"), max_documents=6),
    ]
    prepare(sections, base_tokenizer, tmp_path / "one")
    threads = [
        threading.Thread(target=prepare, args=(sections, base_tokenizer, tmp_path / "three", "error", None, worker, 3))
        for worker in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


def test_spawned_workers_write_the_same_bytes(
    tmp_path: Path, tokenizer_folders: dict[str, str], base_tokenizer: Tokenizer
) -> None:
    sections = [source(raw_folder(tmp_path))]
    make = partial(load_tokenizer, tokenizer_folders["sentencepiece"])
    prepare(sections, base_tokenizer, tmp_path / "one")
    reports: list[PrepareProgress] = []
    prepare_with_workers(make, sections, tmp_path / "two" / "store", 2, "error", reports.append)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    latest = {report.worker: report for report in reports}
    assert sum(report.documents for report in latest.values()) == len(TEXTS)
    assert all(report.read_bytes == report.total_bytes for report in latest.values())


def kill_myself() -> Tokenizer:
    os.kill(os.getpid(), 9)
    raise AssertionError


def refuse() -> Tokenizer:
    raise DataError("refused on purpose")


def test_the_first_error_of_a_worker_arrives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="refused on purpose"):
        prepare_with_workers(refuse, [source(raw_folder(tmp_path))], tmp_path, 2, "error", lambda report: None)


def test_a_killed_worker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DsftError, match=r"Worker \d of dsft prepare was ended with exit code -9"):
        prepare_with_workers(kill_myself, [source(raw_folder(tmp_path))], tmp_path, 2, "error", lambda report: None)


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is replaced; an inode alone may be used again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_what_is_prepared_is_kept_and_what_changed_is_made_again(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    raw = raw_folder(tmp_path)
    (store,) = prepare([source(raw)], base_tokenizer, tmp_path)
    first = versions(Path(store.place))
    (again,) = prepare([source(raw)], base_tokenizer, tmp_path)
    assert versions(Path(store.place)) == first
    assert again.fingerprint == store.fingerprint

    write_jsonl(raw / "1.jsonl", [{"text": "something else"}])
    (changed,) = prepare([source(raw)], base_tokenizer, tmp_path)
    now = versions(Path(store.place))
    assert {name for name in first if first[name] != now[name]} == {
        "shard-000001.tokens",
        "shard-000001.index",
        "manifest.json",
    }
    assert changed.fingerprint != store.fingerprint
    assert len(documents(changed)) == 9

    write_jsonl(raw / "3.jsonl", [{"text": "appended"}])
    (grown,) = prepare([source(raw)], base_tokenizer, tmp_path)
    assert grown.num_shards == 4
    (Path(store.place) / "shard-000002.tokens").unlink()
    (mended,) = prepare([source(raw)], base_tokenizer, tmp_path)
    assert documents(mended) == documents(grown)
    (Path(store.place) / "shard-000002.tokens").unlink()  # not cut in place: `grown` has it mapped
    (Path(store.place) / "shard-000002.tokens").write_bytes(b"cut")
    (Path(store.place) / "manifest.json").unlink()
    (mended,) = prepare([source(raw)], base_tokenizer, tmp_path)
    assert documents(mended) == documents(grown)
    os.utime(raw / "0.jsonl", ns=(5, 5))
    (touched,) = prepare([source(raw)], base_tokenizer, tmp_path)
    assert touched.fingerprint == grown.fingerprint


def test_folders_follow_what_decides_the_ids(
    tmp_path: Path, base_tokenizer: Tokenizer, chat_tokenizer: Tokenizer
) -> None:
    text, other = source(tmp_path / "a"), source(tmp_path / "b")
    chat = source(tmp_path / "a", format="messages")
    folders = [
        store_name(text, base_tokenizer),
        store_name(other, base_tokenizer),
        store_name(source(tmp_path / "a", text_field="body"), base_tokenizer),
        store_name(chat, base_tokenizer),
        store_name(chat, chat_tokenizer),
        store_name(source(tmp_path / "a", format="messages", supervise="all"), chat_tokenizer),
    ]
    assert len(set(folders)) == len(folders)
    assert store_name(text, chat_tokenizer) == folders[0]
    weighted = source(tmp_path / "a", weight=0.5, loss_weight=2.0)
    assert store_name(weighted, base_tokenizer) == folders[0]


BAD = [
    '{"text": "good one"}',
    '{"text": 3}',
    "not json",
    '{"text": ""}',
    '["list"]',
    '{"text": "a"}',
    '{"text": "good"}',
]


def test_bad_records_stop_or_are_counted(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD))
    with pytest.raises(DataError, match=r"a.jsonl:2: field 'text' is a number.*data.bad_records: skip"):
        prepare([source(path)], base_tokenizer, tmp_path)
    assert not list((tmp_path / "store").rglob("*.tokens"))
    lines: list[str] = []
    (store,) = prepare([source(path)], base_tokenizer, tmp_path, "skip", lines)
    assert store.manifest.counts == {"bad_records": 3, "without_text": 1}
    assert len(documents(store)) == 3
    assert lines[0].startswith(f"skipped {path}:2: field 'text' is a number")
    assert lines[-1] == f"skipped 3 bad records of {path}"
    with pytest.raises(DataError, match=r"a.jsonl:2"):  # a store made by skipping is no store without bad records
        prepare([source(path)], base_tokenizer, tmp_path)


def test_documents_that_teach_nothing_are_dropped_and_counted(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    user, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [user]}, {"messages": [user, answer]}])
    (store,) = prepare([source(path, format="messages")], chat_tokenizer, tmp_path)
    assert store.manifest.counts == {"without_text": 1}
    assert len(documents(store)) == 1


def test_a_source_without_documents_is_an_error(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    for _ in range(2):  # the second time the store is there already
        with pytest.raises(DataError, match=r"'docs' is empty: its 1 shards gave no document .* 1 without text"):
            prepare([source(path)], base_tokenizer, tmp_path)


def test_chat_data_without_a_template_is_an_error_before_anything_is_read(
    tmp_path: Path, base_tokenizer: Tokenizer
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": []}])
    with pytest.raises(DataError, match=r"'docs' \(format messages\): The tokenizer has no chat template"):
        prepare([source(path, format="messages")], base_tokenizer, tmp_path)
    assert not (tmp_path / "store").exists()


def test_max_documents_takes_the_first_of_the_listing(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    raw = raw_folder(tmp_path)
    whole = EvaluationSetSection(name="whole", path=str(raw))
    some = EvaluationSetSection(name="some", path=str(raw), max_documents=6)
    all_store, some_store = prepare([whole, some], base_tokenizer, tmp_path)
    assert documents(some_store) == documents(all_store)[:6]
    assert some_store.num_shards == 2
    inode = (Path(some_store.place) / "manifest.json").stat().st_ino
    prepare([some], base_tokenizer, tmp_path)
    assert (Path(some_store.place) / "manifest.json").stat().st_ino == inode
    (shard0, _) = documents(some_store)[:4], documents(some_store)[4:]
    write_jsonl(raw / "0.jsonl", [{"text": TEXTS[0]}])
    (moved,) = prepare([some], base_tokenizer, tmp_path)
    assert documents(moved) == [shard0[0], *documents(all_store)[4:9]]


def test_a_failed_worker_stops_those_who_wait(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    raw = raw_folder(tmp_path)
    (raw / "1.jsonl").write_text("{}\n")
    sections = [source(raw)]
    failures: list[DsftError] = []
    (folder := tmp_path / "store" / store_name(sections[0], base_tokenizer)).mkdir(parents=True)

    def work() -> None:
        try:
            prepare(sections, base_tokenizer, tmp_path, worker=0, num_workers=2)
        except DsftError as error:
            failures.append(error)

    with claimed(folder, 1, is_alone=False):  # worker 1 is at it
        waiting = threading.Thread(target=work)
        waiting.start()
        while not list(folder.glob("shard-000002.index")):
            time.sleep(0.05)
        FailureNotes([folder], 1).leave(DataError("1.jsonl:1: there is no field 'text'"))
        waiting.join(30)
        assert not waiting.is_alive()
    assert str(failures[0]).startswith("worker 1 on ")
    with pytest.raises(DataError, match="there is no field 'text'"):  # not stopped by the old note
        prepare(sections, base_tokenizer, tmp_path, worker=1, num_workers=2)
    write_jsonl(raw / "1.jsonl", [{"text": "mended"}])
    (store,) = prepare(sections, base_tokenizer, tmp_path)
    assert store.num_shards == 3


def test_a_disk_that_refuses_leaves_published_shards_whole(
    tmp_path: Path, base_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    raw = raw_folder(tmp_path)
    real = os.replace

    def full_at_the_second_shard(old: Any, new: Any) -> None:
        if "shard-000001" in str(new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(old, new)

    monkeypatch.setattr(os, "replace", full_at_the_second_shard)
    with pytest.raises(SaveError, match=r"cannot write .*shard-000001.tokens: No space left"):
        prepare([source(raw)], base_tokenizer, tmp_path)
    names = {path.name for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert names == {"shard-000000.tokens", "shard-000000.index", "failed-worker-0.json"}
    monkeypatch.undo()
    (store,) = prepare([source(raw)], base_tokenizer, tmp_path)
    assert len(documents(store)) == len(TEXTS)


def test_any_failure_is_told_to_those_that_wait(
    tmp_path: Path, base_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise IndexError("position 7 of 7")

    monkeypatch.setattr("dsft.corpus.write_shard.prepare_shard", broken)
    with pytest.raises(IndexError):
        prepare([source(raw_folder(tmp_path))], base_tokenizer, tmp_path)
    (note,) = (tmp_path / "store").rglob("failed-worker-0.json")
    assert json.loads(note.read_text())["message"] == "IndexError: position 7 of 7"


KILLED = """
import os, signal, sys
from pathlib import Path
from dsft.config.models import SourceSection
from dsft.corpus.prepare import prepare_sources
from dsft.corpus.tokenizer import load_tokenizer
import dsft.corpus.shard as shard
real, count = shard.ShardWriter.add, 0
def add(self, document):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, document)
shard.ShardWriter.add = add
source = SourceSection(name="docs", path=sys.argv[2])
prepare_sources([source], load_tokenizer(sys.argv[1]), Path(sys.argv[4]), 0, 1, "error")
"""


@pytest.mark.slow
def test_a_killed_preparation_continues(
    tmp_path: Path, base_tokenizer: Tokenizer, tokenizer_folders: dict[str, str]
) -> None:
    raw = raw_folder(tmp_path)
    (whole,) = prepare([source(raw)], base_tokenizer, tmp_path / "whole")
    store_dir = tmp_path / "killed" / "store"
    command = [sys.executable, "-c", KILLED, tokenizer_folders["sentencepiece"], str(raw), "6", str(store_dir)]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    (folder,) = store_dir.iterdir()
    left = sorted(os.listdir(folder), key=lambda name: (not name.endswith(".tmp"), name))
    assert left[0].endswith(".tmp")
    assert left[1:] == [".shard-000001.claim", "shard-000000.index", "shard-000000.tokens"]
    inode = (folder / "shard-000000.tokens").stat().st_ino
    os.utime(folder / left[0], (0, 0))  # as if it were left an hour ago
    (store,) = prepare([source(raw)], base_tokenizer, tmp_path / "killed")
    assert (folder / "shard-000000.tokens").stat().st_ino == inode
    assert tree(Path(store.place)) == tree(Path(whole.place))


def test_statistics_agree_with_numpy(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    (store,) = prepare([source(raw_folder(tmp_path))], base_tokenizer, tmp_path)
    lengths = np.array([len(ids) for ids in documents(store)])
    found = source_statistics(store)
    assert (found.documents, found.tokens, found.longest) == (len(lengths), lengths.sum(), lengths.max())
    assert found.supervised_tokens == lengths.sum() - len(lengths)
    for percentile, value in found.length_percentiles.items():
        assert value == np.percentile(lengths, int(percentile), method="inverted_cdf")
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found.bytes_per_token == pytest.approx(text_bytes / found.supervised_tokens)


def test_preview_shows_what_is_learned_and_what_is_left_out(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    good = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a </s>", "loss_weight": 0.5}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": good}, {"messages": good[:1]}, {"messages": 3}, {}])
    section = source(path, format="messages")
    first, second, third = preview_source(section, chat_tokenizer, 3)
    assert "".join(segment.text for segment in first.segments) == chat_tokenizer.decode(first.ids)
    assert [(s.text, s.weight) for s in first.segments if s.weight] == [("a </s><|im_end|>", 0.5)]
    assert second.left_out == "without text"
    assert "not a list of messages" in third.left_out
    assert third.location == f"{path}:3"
    assert not (tmp_path / "store").exists()

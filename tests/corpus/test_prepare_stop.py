"""A stop request, or the failure of another worker, ends a preparation soon, and what is prepared stays."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from dsft.config.models import SourceSection
from dsft.corpus.claims import claimed
from dsft.corpus.prepare import prepare_sources, store_name
from dsft.corpus.progress import PrepareProgress, no_progress
from dsft.corpus.shard import prepare_shard
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DataError, DsftError, StoppedEarly
from dsft.store.reader import SourceStore

NUM_SHARDS = 3


@pytest.fixture
def section(tmp_path: Path) -> SourceSection:
    texts = [topics[name] for name in sorted(topics)[:12]]
    (tmp_path / "raw").mkdir()
    for shard in range(NUM_SHARDS):
        lines = [json.dumps({"text": text}) for text in texts[shard::NUM_SHARDS]]
        (tmp_path / "raw" / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return SourceSection(name="docs", path=str(tmp_path / "raw"))


@pytest.fixture
def folder(tmp_path: Path, section: SourceSection, base_tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "store" / store_name(section, base_tokenizer)
    folder.mkdir(parents=True)
    return folder


def asked(progress: PrepareProgress) -> None:
    raise StoppedEarly("stopped on request (SIGINT)")


def test_a_worker_that_is_asked_to_stop_stops_those_who_wait(
    tmp_path: Path, section: SourceSection, base_tokenizer: Tokenizer, folder: Path
) -> None:
    failures: dict[int, DsftError] = {}

    def work(worker: int, progress: Callable[[PrepareProgress], None]) -> None:
        try:
            prepare_sources([section], base_tokenizer, tmp_path / "store", worker, 2, "error", progress)
        except DsftError as error:
            failures[worker] = error

    with claimed(folder, 1, is_alone=False):  # a third is at it
        waiting = threading.Thread(target=work, args=(0, no_progress))
        waiting.start()
        while len(list(folder.glob("*.index"))) < NUM_SHARDS - 1:
            time.sleep(0.05)
        work(1, asked)
        waiting.join(30)
    assert {worker: type(error) for worker, error in failures.items()} == {0: StoppedEarly, 1: StoppedEarly}
    prepare_sources([section], base_tokenizer, tmp_path / "store", 0, 1, "error")
    assert SourceStore(folder).num_shards == NUM_SHARDS


def test_a_request_is_seen_while_waiting_for_others(
    tmp_path: Path, section: SourceSection, base_tokenizer: Tokenizer, folder: Path
) -> None:
    def asked_later(progress: PrepareProgress) -> None:
        if len(list(folder.glob("*.index"))) == NUM_SHARDS - 1:  # worker 1 has the last one
            asked(progress)

    with claimed(folder, 1, is_alone=False), pytest.raises(StoppedEarly):
        prepare_sources([section], base_tokenizer, tmp_path / "store", 0, 2, "error", asked_later)


def test_a_failure_elsewhere_is_seen_between_two_shards(
    tmp_path: Path, section: SourceSection, base_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def other_fails(folder: Path, number: int, *arguments: Any) -> Any:
        made.append(number)
        note = {"worker": 1, "host": "b", "message": "x.jsonl:1", "stopped": False}
        (folder / "failed-worker-1.json").write_text(json.dumps(note))
        return prepare_shard(folder, number, *arguments)

    monkeypatch.setattr("dsft.corpus.write_shard.prepare_shard", other_fails)
    with pytest.raises(DataError, match=r"worker 1 on b could not prepare its part: x\.jsonl:1"):
        prepare_sources([section], base_tokenizer, tmp_path / "store", 0, 2, "error")
    assert len(made) == 1

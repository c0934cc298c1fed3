"""Shards are tokenised in the order in which they are wished for; what another host is at is left to it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from dsft.corpus.ahead import Wishes, prepare_wished
from dsft.corpus.prepare import Job, make_folder, make_job, published
from dsft.corpus.progress import Reporter, no_progress
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DataError
from tests.corpus.test_claims import other_process
from tests.corpus.test_prepare import prepare, raw_folder, source, tree


def job_of(raw: Path, tokenizer: Tokenizer, store_dir: Path) -> Job:
    job = make_job(source(raw), tokenizer, store_dir, "error")
    make_folder(job.folder)
    return job


def there(job: Job) -> list[int]:
    return [n for n, raw in enumerate(job.shards) if published(job, n, raw, None) is not None]


class Stopping(Wishes):
    """Ends when it is empty, so that a test need not."""

    def take(self) -> tuple[int, int] | None:
        if not any(self._wished.values()):
            self.end()
        return super().take()


def work(jobs: dict[int, Job], wishes: Wishes, *, is_alone: bool = True) -> None:
    prepare_wished(jobs, wishes, Reporter(no_progress, 0), is_alone=is_alone)


def test_the_sources_take_turns_and_a_new_wish_replaces_the_old_one() -> None:
    wishes = Wishes()
    wishes.put(0, [5, 6, 7])
    wishes.put(1, [1])
    taken = [wishes.take() for _ in range(3)]
    assert taken == [(0, 5), (1, 1), (0, 6)]
    wishes.put(0, [9])
    wishes.put_back(0, 2)
    assert [wishes.take(), wishes.take()] == [(0, 9), (0, 2)]
    threading.Timer(0.1, wishes.end).start()
    assert wishes.take() is None, "it waits for a wish, or for the end"


def test_what_is_wished_for_is_made_and_nothing_else(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    raw = raw_folder(tmp_path, num_shards=5)
    job = job_of(raw, base_tokenizer, tmp_path / "store")
    wishes = Stopping()
    wishes.put(0, [3, 1])
    work({0: job}, wishes)
    assert there(job) == [1, 3]
    wishes = Stopping()
    wishes.put(0, [0, 1, 2, 3, 4])
    work({0: job}, wishes)
    (whole,) = prepare([source(raw)], base_tokenizer, tmp_path)  # collects what is there
    (fresh,) = prepare([source(raw)], base_tokenizer, tmp_path / "fresh")
    assert tree(Path(whole.place)) == tree(Path(fresh.place))


def test_a_shard_of_another_host_is_made_here_when_that_is_killed(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    job = job_of(raw_folder(tmp_path), base_tokenizer, tmp_path / "store")
    wishes = Stopping()
    wishes.put(0, [1, 2])
    with other_process(job.folder, 1) as process:
        worker = threading.Thread(target=work, args=({0: job}, wishes), kwargs={"is_alone": False})
        worker.start()
        while there(job) != [2]:
            assert worker.is_alive()
        process.kill()
        worker.join(30)
    assert there(job) == [1, 2]


def test_a_raw_file_that_is_replaced_before_its_turn_is_refused(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    raw = raw_folder(tmp_path)
    job = job_of(raw, base_tokenizer, tmp_path / "store")
    replaced = raw / "1.jsonl"
    time_ns = replaced.stat().st_mtime_ns
    replaced.write_text(json.dumps({"text": "something else"}) + "\n")
    os.utime(replaced, ns=(time_ns, time_ns))  # its size alone says so
    wishes = Stopping()
    wishes.put(0, [0, 1])
    with pytest.raises(DataError, match=r"1\.jsonl was changed after the run began"):
        work({0: job}, wishes)
    assert there(job) == [0]

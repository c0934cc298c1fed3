"""Training over shards that are still raw: the same batches as over the prepared store, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest

from dsft.batch.loader import Loader
from dsft.config.models import RunConfig
from dsft.corpus.ahead import Wishes, prepare_wished
from dsft.corpus.prepare import Job, prepare_sources
from dsft.corpus.progress import Reporter, no_progress
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.errors import DataError, StoppedEarly
from dsft.launch.owner import RunFolder
from dsft.launch.progress import Progress
from dsft.launch.stop import StopFlag
from dsft.sampling.plan import Planner
from dsft.store.layout import index_path
from dsft.store.reader import SourceStore
from dsft.train.growth import sources_before
from dsft.train.setup import Data, build_batch_spec, plan_sources, planned_sources
from dsft.train.step_log import DATA_LOG_NAME
from dsft.train.store_identity import changed_stores, is_known_as, stores_identity
from dsft.train.streamed_files import Streaming
from dsft.train.streaming import AheadProcess, EndNote
from dsft.train.verify_run import verify_run
from dsft.world import World
from tests.support.object_store import s3_server
from tests.support.run_log import LoggedRun
from tests.support.tokenizers import tiny_tokenizer_folder

NUM_SHARDS = {"a": 12, "b": 5}
GROUP_SHARDS = 2


class InThread:
    """The real loop of the background process, in a thread; says what ended it as that does."""

    def __init__(self, run_dir: Path, attempt: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.note = EndNote(run_dir, attempt)
        self.jobs: dict[int, Job] = {}
        self.wished: list[int] = []
        self._wishes = Wishes()
        threading.Thread(target=self._work, daemon=True).start()

    def wish(self, source: int, job: Job, shards: Sequence[int]) -> None:
        self.jobs[source] = job
        self.wished += [shard for shard in shards if source == 0 and shard not in self.wished]
        self._wishes.put(source, shards)

    def check(self) -> None:
        self.note.check()

    def end(self) -> None:
        self._wishes.end()

    def _work(self) -> None:
        try:
            prepare_wished(self.jobs, self._wishes, Reporter(no_progress, 0), is_alone=True)
        except DataError as error:
            self.note.leave(error)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))), None, False, (), None)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    texts = [topics[name][:300] for name in sorted(topics)]
    for source, num_shards in NUM_SHARDS.items():
        (tmp_path / "raw" / source).mkdir(parents=True)
        for shard in range(num_shards):
            rows = [json.dumps({"text": f"{source} {text}"}) for text in texts[shard :: NUM_SHARDS["a"]]]
            (tmp_path / "raw" / source / f"{shard:02d}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "raw"


def keys(raw: Path | str, store: Path, names: Sequence[str] = ("a", "b"), **train: Any) -> dict[str, Any]:
    return {
        "model": {"path": "-"},
        "data": {
            "pack_tokens": 64,
            "sources": [{"name": name, "path": f"{raw}/{name}"} for name in names],
            "window_documents": 7,
            "group_shards": GROUP_SHARDS,
            "store_dir": str(store),
        },
        "train": {"global_batch_packs": 4, "lr": 1e-3, **train},
    }


def parse(config: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({**config, "run": {"name": "t", "dir": "unused"}})


def prepared(config: dict[str, Any], tokenizer: Tokenizer) -> list[SourceStore]:
    parsed = parse(config)
    assert parsed.data.store_dir is not None
    folders = prepare_sources(parsed.data.sources, tokenizer, Path(parsed.data.store_dir), 0, 1, "error")
    return [SourceStore(folder) for folder in folders]


def streamed(config: dict[str, Any], tokenizer: Tokenizer, preparer: Any) -> list[SourceStore]:
    return list(Streaming(preparer, Progress()).open(parse(config), tokenizer).values())


def published_shards(store: SourceStore) -> int:
    return sum(index_path(Path(store.place), shard).exists() for shard in range(store.num_shards))


def log_of(run: LoggedRun) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run.folder / DATA_LOG_NAME).read_text().splitlines()]
    return [(line["step"], line["data_hash"], line["tokens"]) for line in lines]


def planner_over(config: dict[str, Any], stores: Sequence[SourceStore]) -> Planner:
    parsed = parse(config)
    return plan_sources(parsed, planned_sources(parsed, stores, (None,) * len(stores)))


def rank(local_rank: int, folder: Path, attempt: str, stop: StopFlag | None = None) -> AheadProcess:
    """One of four ranks on two hosts; rank 0 starts the process of its host."""
    world = World(local_rank, 4, local_rank, 2, 0, None, None, "torchrun")
    config = parse(keys("raw", folder, tokens=1))
    return AheadProcess(config, world, RunFolder(folder, attempt, None), stop or StopFlag())


def test_every_world_size_logs_what_a_run_over_the_prepared_store_does(
    tmp_path: Path, raw: Path, tokenizer: Tokenizer
) -> None:
    config = keys(raw, tmp_path / "prepared", tokens=60_000)
    whole = LoggedRun(tmp_path / "whole", prepared(config, tokenizer), config)
    last = whole.attempt("same", 1)
    for num_ranks in (1, 2, 3):
        config = keys(raw, tmp_path / f"store-{num_ranks}", tokens=60_000)
        preparer = InThread(tmp_path / f"run-{num_ranks}", "same")
        run = LoggedRun(tmp_path / f"run-{num_ranks}", streamed(config, tokenizer, preparer), config)
        assert run.attempt("same", num_ranks) == last
        assert (run.folder / DATA_LOG_NAME).read_text() == (whole.folder / DATA_LOG_NAME).read_text()
        preparer.end()
    assert last > 30


def test_a_run_that_changes_its_size_uses_each_document_once_an_epoch(
    tmp_path: Path, raw: Path, tokenizer: Tokenizer
) -> None:
    whole = prepared(keys(raw, tmp_path / "prepared", ["a"], steps=1), tokenizer)
    tokens = 2 * int(whole[0].manifest.num_tokens.sum())
    expected = LoggedRun(tmp_path / "whole", whole, keys(raw, tmp_path / "prepared", ["a"], tokens=tokens))
    expected.attempt("only", 1)

    config = keys(raw, tmp_path / "store", ["a"], tokens=tokens)
    first, second = InThread(tmp_path / "run", "aaaa"), InThread(tmp_path / "run", "bbbb")
    run = LoggedRun(tmp_path / "run", streamed(config, tokenizer, first), config)
    run.attempt("aaaa", 1, 8)
    first.end()
    assert published_shards(run.stores[0]) < NUM_SHARDS["a"], "it was ended before all was tokenised"
    with pytest.raises(DataError, match=r"not prepared to its end; run `dsft prepare`"):
        verify_run(run.folder, lambda step, last: None)
    run.stores = streamed(config, tokenizer, second)
    run.attempt("bbbb", 3, after=("aaaa", 8))
    second.end()
    assert log_of(run) == log_of(expected)

    prepared(config, tokenizer)
    report = verify_run(run.folder, lambda step, last: None)
    assert report.is_proved, report.problems
    total = int(whole[0].manifest.num_documents.sum())
    assert [(one.documents, one.is_complete) for one in report.sources["a"]] == [(total, True)] * 2


def test_no_more_is_tokenised_than_this_group_and_the_next(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    config = keys(raw, tmp_path / "store", ["a"], tokens=10_000)
    preparer = InThread(tmp_path / "run", "x")
    stores = streamed(config, tokenizer, preparer)
    planner = planner_over(config, stores)
    next(planner.steps(planner.start()))
    assert GROUP_SHARDS <= published_shards(stores[0]) <= 2 * GROUP_SHARDS
    assert len(preparer.wished) == 2 * GROUP_SHARDS
    preparer.end()


def test_a_damaged_shard_late_in_the_order_ends_every_rank_with_its_line(
    tmp_path: Path, raw: Path, tokenizer: Tokenizer
) -> None:
    config = keys(raw, tmp_path / "first", ["a"], tokens=10**6)
    preparer = InThread(tmp_path / "run", "first")
    planner = planner_over(config, streamed(config, tokenizer, preparer))
    for _, plan in zip(range(100), planner.steps(planner.start()), strict=False):
        if plan.cursor_after.sources[0].epoch:
            break
    preparer.end()
    late = raw / "a" / f"{preparer.wished[-1]:02d}.jsonl"
    late.write_text(late.read_text() + "{broken\n")

    config = keys(raw, tmp_path / "second", ["a"], tokens=10**6)
    preparer = InThread(tmp_path / "run", "second")
    for _ in range(2):  # two ranks: each opens the store for itself
        planner = planner_over(config, streamed(config, tokenizer, preparer))
        steps = planner.steps(planner.start())
        assert next(steps).num_tokens > 0
        with pytest.raises(DataError, match=rf"{late.name}:\d+: "):
            list(steps)
    EndNote(tmp_path / "run", "third").check()  # another start is not ended by it


def identity_of(stores: Sequence[SourceStore]) -> dict[str, Any]:
    return stores_identity({one.name: one for one in stores})


def refused(saved: dict[str, Any], stores: Sequence[SourceStore]) -> list[str]:
    """What a resume with these stores says of a checkpoint of before."""
    return changed_stores(saved, identity_of(stores), sources_before(saved, {one.name: one for one in stores}))


def test_what_changed_between_two_starts_is_named(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    config = keys(raw, tmp_path / "store", ["a"], tokens=100)

    def opened() -> list[SourceStore]:
        preparer = InThread(tmp_path / "run", "x")
        preparer.end()
        return streamed(config, tokenizer, preparer)

    saved = identity_of(opened())
    assert refused(saved, opened()) == []
    file = raw / "a" / "03.jsonl"
    before = file.stat()
    file.write_text(file.read_text().replace("a ", "b ", 1))  # as long as before
    (line,) = refused(saved, opened())
    assert "token store of a: raw:" in line
    assert f"{file} was changed or replaced" in line
    file.write_text(file.read_text().replace("b ", "a ", 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert refused(saved, opened()) == []
    file.rename(tmp_path / "03.jsonl")
    assert f"{file} was removed" in refused(saved, opened())[0]
    (tmp_path / "03.jsonl").rename(file)
    (raw / "a" / "02b.jsonl").write_text('{"text": "more"}\n')
    assert f"02b.jsonl came before {file}" in refused(saved, opened())[0]
    (raw / "a" / "02b.jsonl").rename(raw / "a" / "12.jsonl")
    assert "12.jsonl is new" in refused(saved, opened())[0]


def test_streaming_may_be_turned_on_and_off_between_two_starts(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    config = keys(raw, tmp_path / "store", ["a"], tokens=100)
    preparer = InThread(tmp_path / "run", "x")
    preparer.end()
    streams, whole = streamed(config, tokenizer, preparer), prepared(config, tokenizer)
    saved, saved_whole = identity_of(streams), identity_of(whole)
    assert saved["stores"] != saved_whole["stores"]
    assert refused(saved, whole) == refused(saved_whole, streams) == []
    older = {"stores": saved_whole["stores"]}  # a checkpoint of before there was streaming
    assert refused(older, whole) == []
    assert len(refused(older, streams)) == 1
    assert is_known_as(whole[0], saved["stores"]["a"], NUM_SHARDS["a"])
    (raw / "a" / "12.jsonl").write_text('{"text": "more"}\n')
    grown = prepared(config, tokenizer)
    assert refused(saved_whole, grown) == [], "contents are known: a source may grow"
    assert len(refused(saved, grown)) == 1
    assert is_known_as(grown[0], saved["stores"]["a"], NUM_SHARDS["a"]), "verify-run still knows the first attempt's"
    (raw / "a" / "00.jsonl").touch()
    touched = prepared(config, tokenizer)
    assert refused(saved_whole, touched) == [], "the same tokens"
    assert len(refused(saved, touched)) == 1, "unread shards may be of other files by now"
    assert not is_known_as(touched[0], saved["stores"]["a"], NUM_SHARDS["a"])


def test_a_stop_request_of_one_rank_ends_the_waiting_of_all(tmp_path: Path) -> None:
    stop = StopFlag()
    asked, other, later = rank(1, tmp_path, "this", stop), rank(1, tmp_path, "this"), rank(1, tmp_path, "later")
    for one in (asked, other, later):
        one.check()
    stop.request("SIGTERM")
    for one in (asked, other):
        with pytest.raises(StoppedEarly, match="stopped on request"):
            one.check()
    later.check()


def test_a_background_process_that_is_killed_ends_all_ranks_by_name(tmp_path: Path) -> None:
    main, other = rank(0, tmp_path, "this"), rank(1, tmp_path, "this")
    main.check()
    assert main._process is not None
    main._process.kill()
    main._process.wait()
    main.wish(0, SimpleNamespace(listing=""), [0])  # type: ignore[arg-type]
    for one in (main, other):
        with pytest.raises(DataError, match=r"tokenises ahead was ended with exit code -9 .* --resume auto"):
            one.check()
    rank(1, tmp_path, "next").check()


def test_a_loader_is_closed_while_it_waits_for_what_nobody_makes(
    tmp_path: Path, raw: Path, tokenizer: Tokenizer
) -> None:
    config = keys(raw, tmp_path / "store", ["a"], tokens=10_000)
    preparer = InThread(tmp_path / "run", "x")
    preparer.end()
    progress = Progress()
    stores = tuple(Streaming(preparer, progress).open(parse(config), tokenizer).values())
    spec = build_batch_spec(parse(config), Data(SimpleNamespace(pad_id=0), stores, ()))  # type: ignore[arg-type]
    loader = Loader(
        planner_over(config, stores),
        spec,
        rank=0,
        num_ranks=1,
        micro_batch_packs=1,
        costs=lambda packs: [1.0] * len(packs),
    )
    loader.steps(planner_over(config, stores).start())
    while not progress.is_waiting_for_data:
        time.sleep(0.01)
    loader.close()
    assert not progress.is_waiting_for_data


def test_it_reads_an_object_store(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    import botocore.session

    config = keys(raw, tmp_path / "prepared", ["b"], tokens=9000)
    whole = LoggedRun(tmp_path / "whole", prepared(config, tokenizer), config)
    with s3_server(tmp_path / "server.log") as environment:
        client = botocore.session.get_session().create_client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
        client.create_bucket(Bucket="corpus")
        for path in (raw / "b").iterdir():
            client.put_object(Bucket="corpus", Key=f"b/{path.name}", Body=path.read_bytes())
        config = keys("s3://corpus", tmp_path / "store", ["b"], tokens=9000)
        preparer = InThread(tmp_path / "run", "same")
        run = LoggedRun(tmp_path / "run", streamed(config, tokenizer, preparer), config)
        assert run.attempt("same", 2) == whole.attempt("same", 1) > 5
        saved = identity_of(run.stores)
        client.put_object(Bucket="corpus", Key="b/02.jsonl", Body=b'{"text": "other"}\n')
        (line,) = refused(saved, streamed(config, tokenizer, preparer))
        preparer.end()
    assert log_of(run) == log_of(whole)
    assert "s3://corpus/b/02.jsonl was changed or replaced" in line


def test_a_shard_of_an_older_raw_file_is_not_taken(tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    config = keys(raw, tmp_path / "store", ["b"], tokens=100)
    before = [len(prepared(config, tokenizer)[0].index(shard).lengths) for shard in range(2)]
    (raw / "b" / "00.jsonl").write_text('{"text": "another text, and a short one"}\n')
    preparer = InThread(tmp_path / "run", "x")
    (store,) = streamed(config, tokenizer, preparer)
    store.files.will_need([0, 1])
    assert preparer.wished == [0], "the other one is there"
    assert [len(store.index(shard).lengths) for shard in range(2)] == [1, before[1]]
    preparer.end()

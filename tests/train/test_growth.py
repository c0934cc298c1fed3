"""Sources that grow between two starts: every pass uses each document it has once, whenever the run went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsft.errors import ConfigError
from dsft.sampling.types import shards_of_pass
from dsft.store.reader import SourceStore
from dsft.store.types import Document
from dsft.train.attempts import read_attempts
from dsft.train.growth import Before, sources_before
from dsft.train.resume import check_state
from dsft.train.verify_run import verify_run
from tests.support.run_log import LoggedRun
from tests.support.stores import grow_store, text_document, write_store

VOCAB_TOKENS = 97
OLD_SHARDS, NEW_SHARDS = 3, 2


def config(**train: Any) -> dict[str, Any]:
    return {
        "model": {"path": "-"},
        "data": {
            "pack_tokens": 32,
            "sources": [{"name": "a", "path": "-"}, {"name": "b", "path": "-", "weight": 0.5}],
            "window_documents": 17,
            "group_shards": 2,
        },
        "train": {"global_batch_packs": 4, "lr": 1e-3, **train},
    }


def documents(count: int, seed: int = 3) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [text_document(generator.integers(3, VOCAB_TOKENS, n)) for n in generator.integers(2, 80, count).tolist()]


def stores(folder: Path, shard_documents: int) -> list[SourceStore]:
    """Source ``a``, which will grow, and ``b``, which will not."""
    a = documents(OLD_SHARDS * shard_documents)
    return [
        write_store(folder / "a", a, num_shards=OLD_SHARDS, name="a", vocab_tokens=VOCAB_TOKENS),
        write_store(folder / "b", documents(40, seed=5), num_shards=2, name="b", vocab_tokens=VOCAB_TOKENS),
    ]


def grown(folder: Path, shard_documents: int) -> list[SourceStore]:
    for number in range(NEW_SHARDS):
        grow_store(folder / "a", documents(shard_documents, seed=10 + number))
    return [SourceStore(folder / name) for name in ("a", "b")]


# With 5 documents a shard a window holds more than one pass, so that most steps end inside a window whose rest is of
# the next pass; with 20 a pass has several windows.
@pytest.mark.parametrize(("shard_documents", "tokens"), [(5, 2400), (20, 7000)])
def test_each_pass_uses_each_document_once_wherever_the_run_went_on(
    tmp_path: Path, shard_documents: int, tokens: int
) -> None:
    old = stores(tmp_path, shard_documents)
    whole = LoggedRun(tmp_path / "whole", old, config(tokens=tokens))
    num_steps = whole.attempt("whole", 1)
    new: list[SourceStore] = []
    first_passes: set[int | None] = set()
    for step in range(1, num_steps - 3, 1 if shard_documents == 5 else 9):
        run = LoggedRun(tmp_path / f"run-{step}", old, config(tokens=tokens))
        run.attempt("old", 2, step)
        new = new or grown(tmp_path, shard_documents)
        run.stores = new
        run.attempt("new", 3, step + 2, after=("old", step))
        run.attempt("same", 1, after=("new", step + 2))  # goes on again: nothing has grown since
        report = verify_run(run.folder, lambda *_: None)
        assert report.is_proved, (step, report.problems)
        passes = report.sources["a"]
        expected = [OLD_SHARDS * shard_documents, (OLD_SHARDS + NEW_SHARDS) * shard_documents]
        counts = [one.documents_of_pass for one in passes]
        assert set(counts) <= set(expected), step
        assert counts == sorted(counts), "new shards stay"
        assert all(one.is_complete for one in passes[:-1]), step
        assert {one.documents_of_pass for one in report.sources["b"]} == {40}
        first_passes.add(counts.index(expected[1]) if expected[1] in counts else None)
    assert len(first_passes - {None}) > 1


def test_it_can_grow_twice_and_each_attempt_says_so(tmp_path: Path) -> None:
    run = LoggedRun(tmp_path / "run", stores(tmp_path, 5), config(tokens=6000))
    run.attempt("one", 2, 6)
    run.stores = grown(tmp_path, 5)
    run.attempt("two", 3, 20, after=("one", 6))
    grow_store(tmp_path / "a", documents(5, seed=99))
    run.stores = [SourceStore(tmp_path / name) for name in ("a", "b")]
    run.attempt("three", 1, after=("two", 20))
    report = verify_run(run.folder, lambda *_: None)
    assert report.is_proved, report.problems
    assert {one.documents_of_pass for one in report.sources["a"]} == {15, 25, 30}
    recorded = [attempt.stores[0] for attempt in read_attempts(run.folder)]
    assert [one["num_shards"] for one in recorded] == [3, 5, 6]
    assert [len(one["growth"]) for one in recorded] == [0, 1, 2]


def test_a_pass_has_the_shards_it_began_with() -> None:
    growth = ((2, 3), (5, 4))
    assert [shards_of_pass(9, growth, epoch) for epoch in range(7)] == [3, 3, 4, 4, 4, 9, 9]


def state(opened: list[SourceStore]) -> dict[str, Any]:
    return {
        "config": {},
        "stores": {store.name: store.fingerprint for store in opened},
        "num_shards": {store.name: store.num_shards for store in opened},
    }


def test_only_what_was_added_behind_is_growth(tmp_path: Path) -> None:
    before = stores(tmp_path / "old", 5)
    saved = state(before)
    added = {store.name: store for store in grown(tmp_path / "old", 5)}
    assert sources_before(saved, added) == {"a": Before(OLD_SHARDS, ()), "b": Before(2, ())}
    assert check_state(saved, state(list(added.values())), sources_before(saved, added), allow_data_change=False) == []

    other = documents(25)
    other[3] = text_document([5, 6, 7])
    changed = {
        "a": write_store(tmp_path / "changed", other, num_shards=5, name="a", vocab_tokens=VOCAB_TOKENS),
        "b": added["b"],
    }
    fewer = write_store(tmp_path / "fewer", documents(10), num_shards=2, name="a", vocab_tokens=VOCAB_TOKENS)
    for now in (changed, {"a": fewer, "b": added["b"]}):
        kept = sources_before(saved, now)
        assert set(kept) == {"b"}
        with pytest.raises(ConfigError, match=r"token store of a: .* \(other tokens\)"):
            check_state(saved, state(list(now.values())), kept, allow_data_change=False)
    older = {key: value for key, value in saved.items() if key != "num_shards"}  # of a dsft without growth
    assert set(sources_before(older, added)) == {"b"}


def test_a_length_in_passes_cannot_be_kept(tmp_path: Path) -> None:
    run = LoggedRun(
        tmp_path / "run",
        stores(tmp_path, 5)[:1],
        {**config(epochs=4), "data": {**config()["data"], "sources": config()["data"]["sources"][:1]}},
    )
    run.attempt("one", 1, 3)
    run.stores = grown(tmp_path, 5)[:1]
    with pytest.raises(ConfigError, match=r"'a' has grown .* train.epochs counts passes"):
        run.attempt("two", 1, after=("one", 3))

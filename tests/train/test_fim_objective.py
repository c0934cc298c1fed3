"""The fill-in-the-middle objective from the YAML to the batch, and its proof."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsft.batch.collate import BatchSpec, collate
from dsft.config.models import RunConfig
from dsft.corpus.prepare import prepare_sources
from dsft.corpus.tokenizer import load_tokenizer
from dsft.errors import DataError
from dsft.sampling.fim import FillInTheMiddle
from dsft.store.reader import SourceStore
from dsft.train import setup
from dsft.train.verify_run import verify_run
from tests.support.run_log import LoggedRun
from tests.support.stores import text_document, write_store
from tests.support.tokenizers import tiny_tokenizer_folder

SENTINELS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
OBJECTIVE = FillInTheMiddle(0.7, 0.5, prefix_id=90, suffix_id=91, middle_id=92, num_leading=0, num_trailing=1)


def config(folder: Path, tokenizer: Path | str = "-", **train: float) -> RunConfig:
    source = {"name": "code", "path": f"{folder}/*.jsonl", "objective": {"kind": "fim", "rate": 1.0}}
    return RunConfig.model_validate(
        {
            "run": {"name": "t", "dir": str(folder / "run")},
            "model": {"config": {}, "tokenizer": str(tokenizer), "add_tokens": list(SENTINELS)},
            "data": {"pack_tokens": 48, "sources": [source]},
            "train": {"global_batch_packs": 4, "lr": 1e-3, **(train or {"epochs": 1})},
        }
    )


def store(folder: Path) -> SourceStore:
    generator = np.random.default_rng(5)
    documents = [text_document([*generator.integers(3, 80, n).tolist(), 2]) for n in generator.integers(1, 70, 60)]
    return write_store(folder / "code", documents, num_shards=4, name="code", vocab_tokens=97)


def test_from_yaml_to_batch(tmp_path: Path) -> None:
    texts = [f"def add_{n}(a, b):\n    return a + b + {n}  # <|fim_middle|> is text here\n" for n in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = config(tmp_path, tiny_tokenizer_folder(tmp_path))
    tokenizer = setup.open_tokenizer(run)
    assert len({tokenizer.control.id_of(token) for token in SENTINELS}) == 3
    folders = prepare_sources(run.data.sources, tokenizer, tmp_path / "store", 0, 1, "error")
    data = setup.Data(tokenizer, tuple(SourceStore(folder) for folder in folders), ())
    planner, spec = setup.build_planner(run, data), replace(setup.build_batch_spec(run, data), pack_tokens=4096)
    pieces: dict[tuple[int, int], dict[int, list[int]]] = {}
    for plan in planner.steps(planner.start()):
        for pack in plan.packs:
            batch = collate([pack], spec)
            row, ends = batch.input_ids[0].tolist(), np.cumsum(pack.length).tolist()
            for at, end in enumerate(ends):
                key = (int(pack.shard[at]), int(pack.document[at]))
                pieces.setdefault(key, {})[int(pack.start[at])] = row[end - int(pack.length[at]) : end]
    assert len(pieces) == len(texts)
    for (_, document), parts in pieces.items():
        ids = [token for start in sorted(parts) for token in parts[start]]
        counts = Counter(ids)
        assert [counts[tokenizer.control.id_of(token)] for token in SENTINELS] == [1, 1, 1]
        pre, suf, mid = (ids.index(tokenizer.control.id_of(token)) for token in SENTINELS)
        restored = ids[:pre] + ids[pre + 1 : suf] + ids[mid + 1 : -1] + ids[suf + 1 : mid]
        if suf == pre + 1:  # SPM: the prefix follows the middle sentinel; where it ends is not written
            assert Counter(restored) == Counter(ids[:-1]) - Counter(ids[at] for at in (pre, suf, mid))
        else:
            assert tokenizer.decode(restored).endswith(texts[document])


def test_every_target_but_the_sentinels_is_learned_once_however_it_is_cut(tmp_path: Path) -> None:
    run = config(tmp_path)
    opened = store(tmp_path)
    sources = setup.planned_sources(run, (opened,), (OBJECTIVE,))
    planner = setup.plan_sources(run, sources)
    spec = BatchSpec((opened,), (1.0,), "token", run.data.pack_tokens, pad_id=0, objectives=(sources[0].objective,))
    targets: Counter[int] = Counter()
    first_tokens: Counter[int] = Counter()
    num_tokens = 0
    for plan in planner.steps(planner.start()):
        for pack in plan.packs:
            batch = collate([pack], spec)
            num_tokens += batch.num_tokens
            assert batch.num_tokens == int(pack.length.sum())
            targets.update(batch.targets.tolist())
            begins = np.cumsum(pack.length) - pack.length
            first_tokens.update(batch.input_ids[0, begins[pack.start == 0]].tolist())
    expected: Counter[int] = Counter()
    for shard in range(opened.num_shards):
        expected.update(np.asarray(opened.tokens(shard)).tolist())
    assert targets == expected - first_tokens
    lengths = [sources[0].lengths_in(0, shard) for shard in range(opened.num_shards)]
    assert num_tokens == sum(int(column.sum()) for column in lengths) > int(opened.manifest.num_tokens.sum())


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_two_epochs_are_proved_on_changing_world_sizes(tmp_path: Path, overlong: str) -> None:
    values = {
        "model": {"path": "-"},
        "data": {
            "pack_tokens": 48,
            "overlong": overlong,
            "sources": [{"name": "code", "path": "-"}],
        },
        "train": {"global_batch_packs": 4, "lr": 1e-3, "epochs": 2},
    }
    run = LoggedRun(tmp_path / "run", [store(tmp_path)], values, (OBJECTIVE,))
    run.attempt("one", 1, 5)
    run.attempt("two", 3, after=("one", 5))
    report = verify_run(tmp_path / "run", lambda step, last: None)
    assert report.is_proved, report.problems
    assert [epoch.is_complete for epoch in report.sources["code"]] == [True, True]
    assert report.sources["code"][0].tokens != report.sources["code"][1].tokens
    attempts = tmp_path / "run" / "attempts.jsonl"
    attempts.write_text(attempts.read_text().replace('"middle_id": 92', '"middle_id": 93'))
    assert not verify_run(tmp_path / "run", lambda step, last: None).is_proved


def test_a_sentinel_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    folder = str(tiny_tokenizer_folder(tmp_path))
    with pytest.raises(DataError, match=r"has no token <\|fim_middle\|>.*model.add_tokens"):
        load_tokenizer(folder, add_tokens=SENTINELS[:2], sentinels=SENTINELS)
    plain, with_fim = (load_tokenizer(folder, add_tokens=SENTINELS, sentinels=s) for s in ((), SENTINELS))
    assert plain.text_fingerprint != with_fim.text_fingerprint
    middle = with_fim.control.id_of("<|fim_middle|>")
    assert middle in plain.encode_batch(["a <|fim_middle|> b"])[0]
    assert middle not in with_fim.encode_batch(["a <|fim_middle|> b"])[0]

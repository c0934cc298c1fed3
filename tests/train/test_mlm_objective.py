"""Masked language modelling from the YAML to the loss, its proof, its held-out score, and a whole run."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig

from dsft.batch.collate import collate
from dsft.batch.types import model_inputs
from dsft.config.models import RunConfig
from dsft.corpus.prepare import prepare_sources
from dsft.errors import ModelError
from dsft.model.masked import PackedMaskedLM
from dsft.ops import backend
from dsft.sampling.mlm import MaskedLanguageModelling
from dsft.store.reader import SourceStore
from dsft.train import setup
from dsft.train.verify_run import verify_run
from tests.support.models import copy_of
from tests.support.ranks import REPOSITORY
from tests.support.run_log import LoggedRun
from tests.support.stores import text_document, write_store
from tests.support.tokenizers import tiny_tokenizer_folder, wordpiece_folder

TEXTS = [topics[name][:length] for name, length in zip(sorted(topics), [30, 300, 900, 5, 120, 700] * 4, strict=False)]
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def config(folder: Path, tokenizer: Path, **data: Any) -> RunConfig:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = {"name": "docs", "path": f"{folder}/a.jsonl", "objective": {"kind": "mlm", "rate": 0.3}}
    return RunConfig.model_validate(
        {
            "run": {"name": "t", "dir": str(folder / "run")},
            "model": {"config": {"model_type": "bert", **BERT}, "tokenizer": str(tokenizer)},
            "data": {"pack_tokens": 96, "sources": [source], **data},
            "train": {"global_batch_packs": 4, "lr": 1e-3, "epochs": 1},
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, setup.Data]:
    folder = tmp_path_factory.mktemp("mlm")
    parsed = config(folder, wordpiece_folder(folder))
    tokenizer = setup.open_tokenizer(parsed)
    (store,) = prepare_sources(parsed.data.sources, tokenizer, folder / "store", 0, 1, "error")
    return parsed, setup.Data(tokenizer, (SourceStore(store),), (SourceStore(store),))


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_each_chosen_token_is_predicted_once_and_where_it_stands(
    run: tuple[RunConfig, setup.Data], kernels: str
) -> None:
    parsed, data = run
    planner, spec = setup.build_planner(parsed, data), setup.build_batch_spec(parsed, data)
    tokenizer, (store,) = data.tokenizer, data.stores
    (order,) = spec.objectives
    assert order is not None
    predicted: Counter[tuple[int, int]] = Counter()
    before = backend.current()
    backend.choose(kernels)  # type: ignore[arg-type]
    try:
        batches = [collate(plan.packs, spec) for plan in planner.steps(planner.start())]
    finally:
        backend.choose(before)
    for batch in batches:
        ends = np.cumsum(batch.pieces.length)
        for row, target in zip(batch.rows.tolist(), batch.targets.tolist(), strict=True):
            piece = int(np.searchsorted(ends, row, side="right"))
            document = int(batch.pieces.document[piece])
            at = int(batch.pieces.start[piece]) + row - int(ends[piece] - batch.pieces.length[piece])
            stored = store.tokens(0)[int(store.index(0).token_offsets[document]) + at]
            assert target == stored
            assert target not in tokenizer.control.ids
            predicted[document, at] += 1
    assert set(predicted.values()) == {1}
    expected = set()
    for document in range(len(TEXTS)):
        begin, end = store.index(0).token_offsets[document : document + 2].tolist()
        _, spans = order.rearrange(0, 0, document, np.asarray(store.tokens(0)[begin:end]).astype(np.int32))
        expected |= {(document, at) for at in spans[:, 0].tolist()}
    assert set(predicted) == expected
    assert max(at for _, at in predicted) > 2 * parsed.data.pack_tokens, "a document is cut"


def test_the_loss_of_a_step_is_that_of_transformers_document_by_document(run: tuple[RunConfig, setup.Data]) -> None:
    parsed, data = run
    spec = replace(setup.build_batch_spec(parsed, data), pack_tokens=512)
    plan = next(iter(setup.build_planner(parsed, data).steps(setup.build_planner(parsed, data).start())))
    batch = collate(plan.packs, spec)
    torch.manual_seed(0)
    plain = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=data.tokenizer.vocab_tokens, **BERT)).eval()
    ours = PackedMaskedLM(copy_of(plain))(**model_inputs(batch, torch.device("cpu"))).loss
    total, borders = torch.zeros(()), batch.cu_seqlens.tolist()
    for start, end in itertools.pairwise(borders):
        labels = torch.full((1, end - start), -100)
        inside = (batch.rows >= start) & (batch.rows < end)
        labels[0, (batch.rows[inside] - start).long()] = batch.targets[inside].long()
        if inside.any():
            loss = plain(input_ids=batch.input_ids[:, start:end].long(), labels=labels).loss
            total = total + loss * int(inside.sum())
    torch.testing.assert_close(ours, total, rtol=1e-5, atol=1e-4)


def test_held_out_masks_are_the_same_in_every_run(run: tuple[RunConfig, setup.Data]) -> None:
    parsed, data = run
    first = setup.held_out_spec(parsed, data.tokenizer, data.held_out[0]).objectives[0]
    other_run = parsed.model_copy(update={"run": parsed.run.model_copy(update={"seed": 99})})
    second = setup.held_out_spec(other_run, data.tokenizer, data.held_out[0]).objectives[0]
    trained = setup.build_batch_spec(parsed, data).objectives[0]
    assert first is not None
    assert second is not None
    assert trained is not None
    assert first.key == second.key != trained.key


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_two_epochs_are_proved_on_changing_world_sizes(tmp_path: Path, overlong: str) -> None:
    generator = np.random.default_rng(5)
    documents = [text_document([1, *generator.integers(5, 80, n).tolist(), 2]) for n in generator.integers(1, 90, 60)]
    store = write_store(tmp_path / "docs", documents, num_shards=4, name="docs", vocab_tokens=97)
    values = {
        "model": {"path": "-"},
        "data": {"pack_tokens": 48, "overlong": overlong, "sources": [{"name": "docs", "path": "-"}]},
        "train": {"global_batch_packs": 4, "lr": 1e-3, "epochs": 2},
    }
    objective = MaskedLanguageModelling(0.15, 0.8, 0.1, 4, (0, 1, 2, 3, 4), 97, 48)
    logged = LoggedRun(tmp_path / "run", [store], values, (objective,))
    logged.attempt("one", 1, 5)
    logged.attempt("two", 3, after=("one", 5))
    report = verify_run(tmp_path / "run", lambda step, last: None)
    assert report.is_proved, report.problems
    attempts = tmp_path / "run" / "attempts.jsonl"
    attempts.write_text(attempts.read_text().replace('"mask_share": 0.8', '"mask_share": 0.7'))
    assert not verify_run(tmp_path / "run", lambda step, last: None).is_proved


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    parsed = config(tmp_path, tiny_tokenizer_folder(tmp_path))
    with pytest.raises(ModelError, match="objective mlm of 'docs' needs a mask token"):
        setup.objectives_in_ids(parsed, setup.open_tokenizer(parsed))


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_whole_run_learns_is_proved_exported_and_measured(tmp_path: Path) -> None:
    texts = "".join(json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 3}) + "\n" for _ in range(60))
    (tmp_path / "text.jsonl").write_text(texts)
    (tmp_path / "run.yaml").write_text(
        f"""\
run: {{name: mlm, dir: {tmp_path}/run}}
model: {{config: {{model_type: bert, {", ".join(f"{k}: {v}" for k, v in BERT.items())}}},
         tokenizer: {wordpiece_folder(tmp_path)}, dtype: fp32}}
data: {{pack_tokens: 128, sources: [{{name: text, path: {tmp_path}/text.jsonl, objective: {{kind: mlm}}}}]}}
train: {{steps: 30, global_batch_packs: 4, lr: 1e-2}}
deepspeed: {REPOSITORY}/ds_configs/zero3_offload.json
evaluate: {{at_start: true, sets: [{{name: held_out, path: {tmp_path}/text.jsonl, source: text, max_documents: 9}}]}}
"""
    )

    def dsft(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "dsft", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    dsft("train", "run.yaml")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = [record["loss"] for record in records if record["kind"] == "evaluation"]
    assert last < first - 1
    dsft("data", "verify-run", tmp_path / "run")
    dsft("export", tmp_path / "run", tmp_path / "exported", "--dtype", "fp32")
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported")
    assert type(exported).__name__ == "BertForMaskedLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").mask_token == "[MASK]"
    dsft("eval", tmp_path / "exported", "run.yaml", "--out", tmp_path / "scores")
    measured = json.loads((tmp_path / "scores" / "held_out.json").read_text())
    assert measured["loss"] == pytest.approx(last, rel=1e-5)

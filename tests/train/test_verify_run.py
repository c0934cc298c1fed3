"""``dsft data verify-run`` proves a run that is right, and names the step of one that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsft.cli.main import run as run_cli
from dsft.dist import Groups
from dsft.errors import DataError
from dsft.store.layout import tokens_path
from dsft.store.reader import SourceStore
from dsft.train.attempts import ATTEMPTS_NAME
from dsft.train.step_log import DATA_LOG_NAME
from dsft.train.verify_run import RunReport, verify_run
from tests.support.ranks import run_ranks
from tests.support.run_log import LoggedRun
from tests.support.stores import grow_store, text_document, write_store
from tests.support.training import run_training

VOCAB_TOKENS = 97
DOCUMENTS = {"a": 60, "b": 35}


def _config(**train: Any) -> dict[str, Any]:
    return {
        "model": {"path": "-"},
        "data": {
            "pack_tokens": 32,
            "sources": [{"name": name, "path": "-"} for name in DOCUMENTS],
            "window_documents": 17,
            "group_shards": 2,
        },
        "train": {"global_batch_packs": 4, "lr": 1e-3, **train},
    }


def _stores(folder: Path) -> list[SourceStore]:
    generator = np.random.default_rng(3)
    stores = []
    for name, count in DOCUMENTS.items():
        documents = [
            text_document(generator.integers(3, VOCAB_TOKENS, length).tolist())
            for length in generator.integers(2, 80, count).tolist()
        ]
        stores.append(write_store(folder / name, documents, num_shards=5, name=name, vocab_tokens=VOCAB_TOKENS))
    return stores


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two sources, on 1, 3, 2 and 5 ranks: crashed, resumed from older checkpoints, extended."""
    folder = tmp_path_factory.mktemp("recorded")
    run = LoggedRun(folder / "run", _stores(folder), _config(tokens=3000))
    run.attempt("aaaa", 1, 8)
    run.attempt("aaab", 3, 12, after=("aaaa", 8), saves=False)  # crashes: 9 to 12 are run again
    run.attempt("bbbb", 2, 15, after=("aaaa", 8))
    run.attempt("bbbc", 7, after=("bbbb", 15))
    last = max(run.cursors)
    end = run.attempt("cccc", 5, after=("bbbc", last), tokens=6500)
    run.attempt("dddd", 1, end, after=("cccc", end), saves=False)  # begins, and has nothing to do
    return folder


@pytest.fixture
def copied(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the run and its stores, to be damaged."""
    shutil.copytree(recorded, tmp_path / "copy")
    attempts = tmp_path / "copy" / "run" / ATTEMPTS_NAME
    attempts.write_text(attempts.read_text().replace(str(recorded), str(tmp_path / "copy")))
    return tmp_path / "copy"


def _verify(folder: Path) -> RunReport:
    return verify_run(folder / "run", lambda step, last: None)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / DATA_LOG_NAME).read_text().splitlines()]


def _write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "run" / DATA_LOG_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _line_of(lines: list[dict[str, Any]], attempt: str, step: int) -> dict[str, Any]:
    return next(line for line in lines if (line["attempt"], line["step"]) == (attempt, step))


def test_a_run_across_crashes_and_world_sizes_is_proved(recorded: Path) -> None:
    report = _verify(recorded)
    assert report.problems == ()
    assert report.is_proved
    assert [(a["id"], a["first_step"], a["world_size"]) for a in report.attempts] == [
        ("aaaa", 1, 1),
        ("bbbb", 9, 2),
        ("bbbc", 16, 7),
        ("cccc", report.attempts[3]["first_step"], 5),
    ]
    assert report.superseded_steps == 4
    assert report.tokens >= 6500
    for name, count in DOCUMENTS.items():
        epochs = report.sources[name]
        assert len(epochs) >= 2, name
        assert (epochs[0].is_complete, epochs[0].documents) == (True, count), name
        assert [epoch.epoch for epoch in epochs] == list(range(len(epochs)))


@pytest.mark.parametrize("packing", ["best_fit_decreasing", "next_fit", "concat_and_split"])
def test_two_whole_epochs_use_every_document_twice(tmp_path: Path, packing: str) -> None:
    stores = _stores(tmp_path)[:1]
    config = _config(epochs=2)
    config["data"]["packing"] = packing
    config["data"]["sources"] = config["data"]["sources"][:1]
    run = LoggedRun(tmp_path / "run", stores, config)
    run.attempt("one", 3)
    report = _verify(tmp_path)
    assert report.is_proved
    total = int(stores[0].manifest.num_tokens.sum())
    found = [(epoch.documents, epoch.tokens, epoch.is_complete) for epoch in report.sources["a"]]
    assert found == [(DOCUMENTS["a"], total, True)] * 2


def test_a_world_size_changes_no_line(tmp_path: Path) -> None:
    stores = _stores(tmp_path)
    logs = []
    for num_ranks in (1, 2, 3, 5, 7):
        run = LoggedRun(tmp_path / f"run-{num_ranks}", stores, _config(tokens=2500))
        run.attempt("same", num_ranks)
        logs.append((run.folder / DATA_LOG_NAME).read_text())
    assert len(set(logs)) == 1


def _repeat(lines: list[dict[str, Any]]) -> None:
    first, second = _line_of(lines, "bbbb", 10), _line_of(lines, "bbbb", 11)
    second["data_hash"], second["tokens"] = first["data_hash"], first["tokens"]


def _swap(lines: list[dict[str, Any]]) -> None:
    first, second = _line_of(lines, "aaaa", 3), _line_of(lines, "cccc", lines[-1]["step"] - 1)
    first["data_hash"], second["data_hash"] = second["data_hash"], first["data_hash"]


def _lose_line(lines: list[dict[str, Any]]) -> None:
    lines.remove(_line_of(lines, "bbbb", 12))


def _log_twice(lines: list[dict[str, Any]]) -> None:
    lines.insert(5, _line_of(lines, "aaaa", 5))


def test_steps_that_taught_nothing_are_counted(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["data", "verify-run", str(copied / "run")]) == 0
    assert "no update" not in capsys.readouterr().out
    lines = _lines(copied)
    for attempt, step in (("aaaa", 3), ("bbbb", 11), ("aaab", 10)):  # the last one is superseded
        _line_of(lines, attempt, step)["applied"] = False
    _write_lines(copied, lines)
    assert run_cli(["data", "verify-run", str(copied / "run")]) == 0
    assert "\n2 steps made no update (not finite, or nothing to learn)" in capsys.readouterr().out


def _superseded(lines: list[dict[str, Any]]) -> None:
    _line_of(lines, "aaab", 10)["data_hash"] = 5


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (_repeat, ["step 11: it was given the documents of step 10"]),
        (_swap, ["step 3: it was given the documents of step"]),
        (_lose_line, ["step 12: the data log has no line of it"]),
        (_log_twice, ["step 5: attempt aaaa logged it 2 times"]),
        (_superseded, []),
    ],
)
def test_a_fault_planted_in_the_log(
    copied: Path, plant: Callable[[list[dict[str, Any]]], None], expected: list[str]
) -> None:
    lines = _lines(copied)
    plant(lines)
    _write_lines(copied, lines)
    report = _verify(copied)
    assert report.is_proved == (not expected)
    for text in expected:
        assert any(problem.startswith(text) for problem in report.problems), report.problems
    assert len(report.problems) <= 2 * len(expected), report.problems


def test_a_document_left_out_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader itself is broken: one document never reaches the model."""
    import dsft.batch.loader as loader

    honest = loader.collate_rows
    step = 0
    lost: list[int] = []

    def collate_rows(rows: Any, *others: Any) -> Any:
        nonlocal step
        step += 1
        if step > 3 and len(rows[0][0].length) > 1 and not lost:
            lost.append(step)
            rows = [[rows[0][0].take(slice(1, None))], *rows[1:]]
        return honest(rows, *others)

    monkeypatch.setattr(loader, "collate_rows", collate_rows)
    LoggedRun(tmp_path / "run", _stores(tmp_path), _config(tokens=2000)).attempt("broken", 1)
    report = _verify(tmp_path)
    assert [problem.split(":")[0] for problem in report.problems] == [f"step {lost[0]}"] * 2
    assert "tokens, the plan has" in report.problems[0]
    assert "the store is undamaged" in report.problems[1]


def test_one_changed_token_of_the_store(copied: Path) -> None:
    path = tokens_path(copied / "b", 2)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    report = _verify(copied)
    assert not report.is_proved
    assert all(f"{path}: block 0" in problem for problem in report.problems), report.problems
    assert len({problem.split(":")[0] for problem in report.problems}) >= 2, "a step of each epoch"


def test_a_store_that_was_prepared_anew(copied: Path) -> None:
    write_store(copied / "a", [text_document([5, 6, 7])] * 60, num_shards=5, name="a", vocab_tokens=VOCAB_TOKENS)
    report = _verify(copied)
    assert not report.is_proved
    assert "prepared anew" in report.problems[0]


def test_the_log_of_a_run_that_is_gone(copied: Path) -> None:
    attempts = copied / "run" / ATTEMPTS_NAME
    lines = attempts.read_text().splitlines()
    attempts.write_text("\n".join(line for line in lines if '"id": "aaaa"' not in line) + "\n")
    with pytest.raises(DataError, match="knows no attempt aaaa, so the steps up to 8 cannot be proved"):
        _verify(copied)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no run folder"):
        _verify(tmp_path)


def test_command(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = str(copied / "run")
    assert run_cli(["data", "verify-run", run_dir]) == 0
    text = capsys.readouterr().out
    assert "complete, every document once" in text
    assert "\nproved: " in text
    assert run_cli(["data", "verify-run", run_dir, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["is_proved"]
    assert value["sources"]["a"][0]["is_complete"]
    lines = _lines(copied)
    _repeat(lines)
    _write_lines(copied, lines)
    assert run_cli(["data", "verify-run", run_dir]) == 1
    assert "problem: step 11: " in capsys.readouterr().out


def _train(groups: Groups, folder: Path, resume: str | None) -> None:
    config = _config(tokens=4500)
    config["model"] = {"path": str(folder / "model"), "dtype": "fp32"}
    config["checkpoint"] = {"every_steps": 4, "keep_last": 100}
    run_training(groups, folder / "run", config, [folder / "a", folder / "b"], False, resume)


@pytest.mark.launch
@pytest.mark.timeout(500)
def test_a_real_run_that_went_on_from_an_older_checkpoint_on_other_ranks(tmp_path: Path) -> None:
    torch.manual_seed(1)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_TOKENS, **size)).save_pretrained(tmp_path / "model")
    _stores(tmp_path)
    run_ranks(_train, 2, tmp_path, None, timeout_seconds=240)
    older = tmp_path / "run" / "checkpoints" / "step-00000004"
    added = [text_document(np.arange(3, 50)) for _ in range(9)]
    grow_store(tmp_path / "b", added)
    run_ranks(_train, 2, tmp_path, str(older), timeout_seconds=240)
    report = _verify(tmp_path)
    assert report.is_proved, report.problems
    assert [attempt["first_step"] for attempt in report.attempts] == [1, 5]
    assert report.superseded_steps > report.steps - 8
    passes = [one.documents_of_pass for one in report.sources["b"]]
    assert passes[:2] == [DOCUMENTS["b"], DOCUMENTS["b"] + len(added)]

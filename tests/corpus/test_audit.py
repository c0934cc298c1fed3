"""An audit of rows with planted faults counts each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsft.cli.main import run as run_cli
from dsft.config.models import RunConfig
from dsft.corpus.audit import SourceAudit, audit_source, held_out_ngrams, passed_limits
from dsft.corpus.tokenizer import Tokenizer
from tests.support.tokenizers import tiny_tokenizer_folder

WORDS = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau").split()  # noqa: SIM905


def write(path: Path, rows: list[dict[str, Any] | str]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))


def config(folder: Path, record_format: str, **data: Any) -> RunConfig:
    source = {"name": "s", "path": str(folder / "rows.jsonl"), "format": record_format}
    return RunConfig.model_validate(
        {
            "run": {"name": "t", "dir": str(folder / "run")},
            "model": {"config": {}, "tokenizer": "-"},
            "data": {"pack_tokens": 64, "sources": [source], **data},
            "train": {"global_batch_packs": 1, "lr": 1e-3, "steps": 1},
            "evaluate": {"sets": [{"name": "h", "path": str(folder / "held.jsonl")}]},
        }
    )


def audit(run: RunConfig, tokenizer: Tokenizer) -> SourceAudit:
    held_out = {s.name: held_out_ngrams(s, tokenizer, run.data.audit.ngram_words) for s in run.evaluate.sets}
    return audit_source(run.data.sources[0], run.data, tokenizer, held_out, lambda rows: None)


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_text(tmp_path: Path, base_tokenizer: Tokenizer, overlong: str) -> None:
    base = " ".join(f"{word}{n}" for n in range(3) for word in WORDS[:4])
    write(tmp_path / "held.jsonl", [{"text": " ".join(WORDS)}, {"text": "too short"}])
    rows: list[dict[str, Any] | str] = [
        {"text": base},
        {"text": f" {base}\n"},
        {"text": base.replace("delta2", "other")},
        {"text": "See: " + ", ".join(WORDS[2:16]).upper() + "!"},
        {"text": "caf\u00c3\u00a9"},
        {"text": "broken \ufffd"},
        {"text": "Ã O á são"},
        {"text": "  "},
        {"text": ""},
        {"text": " ".join(f"longer{n}" for n in range(80))},
        {"body": "x"},
        "{not json",
    ]
    write(tmp_path / "rows.jsonl", rows)
    found = audit(config(tmp_path, "text", overlong=overlong, audit={"near_duplicate_jaccard": 0.6}), base_tokenizer)
    assert (found.rows, found.bad, found.refused) == (12, 2, 0)
    assert (found.duplicates, found.near_duplicates) == (1, 1)
    assert found.contaminated == {"h": 1}
    assert found.broken_encoding == 2
    assert found.empty == 1
    assert found.overlong >= 1
    assert sum(found.lengths.values()) == 10
    reasons = {reason.split(":")[0] for reason, _, _ in found.reasons}
    assert reasons == {"not valid JSON", "there is no field '…'; the record's fields are"}
    if overlong == "split":
        assert found.end_of_turn_cut == found.unsupervised == 0
    else:
        assert found.end_of_turn_cut == found.overlong
        assert found.unsupervised == (found.overlong if overlong == "drop" else 0)


def test_conversations(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    write(tmp_path / "held.jsonl", [{"text": "a"}])
    ask, answer = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    long = {"role": "user", "content": " ".join(WORDS * 6)}
    write(
        tmp_path / "rows.jsonl",
        [{"messages": [ask, answer]}, {"messages": [ask]}, {"messages": [ask, call]}, {"messages": [long, answer]}],
    )
    limits = {
        "max_refused_share": 0.2,
        "max_bad_share": 0.0,
        "min_supervised_share": 0.9,
        "max_unsupervised_share": 0.5,
    }
    run = config(tmp_path, "messages", overlong="truncate", audit=limits)
    found = audit(run, chat_tokenizer)
    assert (found.rows, found.bad, found.refused, found.overlong) == (4, 0, 1, 1)
    assert "drops tool_calls of messages[N]" in found.reasons[0][0]
    assert found.reasons[0][2].endswith("rows.jsonl:3")
    assert (found.unsupervised, found.empty) == (1, 1), "the row without an answer has no learned text"
    assert found.end_of_turn_cut == 1
    assert 0 < found.supervised_tokens < found.tokens
    passed = passed_limits(found, run.data.audit)
    assert len(passed) == 2
    assert "25.0000% is over data.audit.max_refused_share (20.0000%)" in passed[0]
    assert "min_supervised_share" in passed[1]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "rows.jsonl", [{"text": " ".join(WORDS)}, {"text": " ".join(WORDS)}])
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{name: t, dir: {tmp_path}/run}}\n"
        f"model: {{config: {{model_type: llama}}, tokenizer: {tiny_tokenizer_folder(tmp_path)}}}\n"
        f"data: {{pack_tokens: 64, sources: [{{name: s, path: {tmp_path}/rows.jsonl}}]}}\n"
        "train: {global_batch_packs: 1, lr: 1e-3, steps: 1}\n"
    )
    assert run_cli(["data", "audit", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "s: 2 rows" in shown
    assert "duplicates" in shown
    limit = ["--set", "data.audit.max_duplicate_share=0.1"]
    assert run_cli(["data", "audit", str(path), "--json", *limit]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["sources"][0]["duplicates"] == 1
    assert "max_duplicate_share" in value["passed_limits"][0]
    assert run_cli(["data", "audit", str(path), "--source", "x"]) == 2
    assert "has no source of that name; it has s" in capsys.readouterr().err

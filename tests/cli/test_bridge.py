"""``dsft data bridge``: a run's text in, a file that the same run trains on out."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from dsft.cli.main import run
from dsft.constants import EXIT_OK, EXIT_USAGE
from dsft.corpus.bridge_rules import RULES
from tests.support.tokenizers import tiny_tokenizer_folder

YAML = """
run: {{name: t, dir: {folder}/runs/t}}
model: {{config: {{model_type: llama}}, tokenizer: {folder}/tokenizer}}
data:
  pack_tokens: 512
  chat_template: chatml
  sources:
    - {{name: docs, path: {folder}/docs.jsonl, weight: 0.7}}
    - {{name: bridge, path: {folder}/bridge.jsonl, format: messages, weight: 0.3}}
train: {{tokens: 100K, global_batch_packs: 4, lr: 1e-3}}
evaluate: {{sets: [{{name: held, path: {folder}/held.jsonl}}]}}
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_tokenizer_folder(folder)
    names = sorted(topics)[:12]
    for file, some in (("docs.jsonl", names), ("held.jsonl", names[:2])):
        (folder / file).write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in some))
    (folder / "run.yaml").write_text(YAML.format(folder=folder))
    return folder / "run.yaml"


def test_pairs_are_written_and_read_by_the_run(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_file.parent / "bridge.jsonl"
    assert run(["data", "bridge", str(run_file), "--out", str(out)]) == EXIT_OK
    said = capsys.readouterr().out
    lines = out.read_text().splitlines()
    assert f"{len(lines)} pairs (cloze " in said
    assert "2 documents left out: held out" in said
    assert run(["data", "preview", str(run_file), "--source", "bridge", "-n", "1"]) == EXIT_OK
    answer = json.loads(lines[0])["messages"][1]["content"]
    assert f"[[{answer}" in capsys.readouterr().out


def test_rules_and_numbers_are_chosen(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rule", "section", "--per-document", "1", "--source", "docs", "--json"]
    assert run(["data", "bridge", str(run_file), "--out", str(run_file.parent / "other.jsonl"), *options]) == EXIT_OK
    counts = json.loads(capsys.readouterr().out)
    assert set(counts["pairs"]) == {"section"}
    assert 0 < counts["num_pairs"] <= counts["documents"]
    assert run(["data", "bridge", "--help"]) == EXIT_OK
    assert f"[{'|'.join(RULES)}]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--source", "bridge"], "no source of raw text (format: text) of that name; it has docs"),
        (["--set", "data.sources.0.format=messages"], "no source has format: text"),
        (["--rule", "guess"], "'guess' is not one of"),
    ],
)
def test_what_cannot_be_bridged_is_named(
    run_file: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_file.parent / "none.jsonl"
    assert run(["data", "bridge", str(run_file), "--out", str(out), *options]) == EXIT_USAGE
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from dsft.cli.data import planned_epochs
from dsft.cli.main import run
from dsft.config.load import load_config
from dsft.constants import EXIT_OK, EXIT_USAGE
from dsft.store.reader import SourceStore
from tests.support.stores import text_document, write_store
from tests.support.tokenizers import tiny_tokenizer_folder

NAMES = sorted(topics)[:8]

YAML = """
run: {{name: t, dir: {folder}/runs/t}}
model: {{config: {{model_type: llama}}, tokenizer: {folder}/tokenizer}}
data:
  pack_tokens: 512
  chat_template: chatml
  sources:
    - {{name: docs, path: {folder}/docs.jsonl, weight: 0.75}}
    - {{name: qa, path: {folder}/qa.jsonl, format: messages, weight: 0.25}}
train: {{tokens: 100K, global_batch_packs: 4, lr: 1e-3}}
evaluate: {{sets: [{{name: held, path: {folder}/docs.jsonl, max_documents: 2}}]}}
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_tokenizer_folder(folder)
    with open(folder / "docs.jsonl", "w") as docs, open(folder / "qa.jsonl", "w") as qa:
        for name in NAMES:
            docs.write(json.dumps({"text": topics[name]}) + "\n")
            pair = [{"role": "user", "content": name}, {"role": "assistant", "content": f"[{name}]</s>"}]
            qa.write(json.dumps({"messages": pair}) + "\n")
    (folder / "run.yaml").write_text(YAML.format(folder=folder))
    return folder / "run.yaml"


def test_prepare_then_stats(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prepare", str(run_file)]) == EXIT_OK
    out = capsys.readouterr().out
    assert "docs: 8 documents" in out
    assert "held: 2 documents" in out
    assert run(["data", "stats", str(run_file), "--json"]) == EXIT_OK
    docs, qa, held = json.loads(capsys.readouterr().out)["sources"]
    assert (docs["documents"], qa["documents"], held["documents"]) == (8, 8, 2)
    assert docs["epochs"] == pytest.approx(75_000 / docs["tokens"])
    assert qa["epochs"] == pytest.approx(25_000 / qa["tokens"])
    assert held["epochs"] is None
    assert docs["supervised_share"] == pytest.approx(1 - 8 / docs["tokens"])
    assert 0.2 < qa["supervised_share"] < 0.8
    assert run(["data", "stats", str(run_file)]) == EXIT_OK
    table = capsys.readouterr().out
    assert "bytes/token" in table
    assert "held out" in table


def test_preview_brackets_what_is_learned(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(["data", "preview", str(run_file), "--source", "qa", "-n", "2"]) == EXIT_OK
    out = capsys.readouterr().out
    first = f"<|im_start|>user\n{NAMES[0]}<|im_end|>\n<|im_start|>assistant\n[[[{NAMES[0]}]</s><|im_end|>]]\n"
    assert first in out
    assert out.count("---- qa ·") == 2
    assert "\x1b" not in out


def test_preview_as_json(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "preview", str(run_file), "-n", "1", "--json"]) == EXIT_OK
    docs, qa = json.loads(capsys.readouterr().out)["sources"]
    assert docs["name"] == "docs"
    (record,) = qa["records"]
    assert [segment["weight"] for segment in record["segments"]] == [0.0, 1.0, 0.0]
    assert sum(segment["tokens"] for segment in record["segments"]) == len(record["ids"])


def test_user_errors_are_one_paragraph(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "preview", str(run_file), "--source", "nothing"]) == EXIT_USAGE
    assert "has no source of that name; it has docs, qa, held" in capsys.readouterr().err
    bad = ["--set", f"data.sources=[{{name: docs, path: {run_file.parent}/gone.jsonl}}]"]
    assert run(["prepare", str(run_file), *bad]) == EXIT_USAGE
    assert "there is no file or folder" in capsys.readouterr().err
    base = ["--set", "data.chat_template=null"]
    assert run(["prepare", str(run_file), *base]) == EXIT_USAGE
    assert "The tokenizer has no chat template (base models have none)" in capsys.readouterr().err


def stages_config(run_file: Path, *overrides: str) -> dict[str, float]:
    folder = run_file.parent / "stores"
    stores: list[SourceStore] = []
    for name, length in (("docs", 1000), ("qa", 100)):
        stores.append(write_store(folder / name, [text_document([1] * length)] * 10, name=name))
    return planned_epochs(load_config(run_file, overrides), stores)


def test_epochs_follow_stages_and_the_overlong_policy(run_file: Path) -> None:
    stages = (
        "data.stages=[{until_tokens: 10K, weights: {docs: 1.0}}, {until_tokens: 11K, weights: {docs: 0.5, qa: 0.5}}]"
    )
    # 10K of docs, then the last stage runs to 100K: 45K of each.
    assert stages_config(run_file, stages) == {"docs": 55_000 / 10_000, "qa": 45_000 / 1_000}
    assert stages_config(run_file, "data.overlong=truncate") == {"docs": 75_000 / 5_120, "qa": 25_000 / 1_000}
    assert stages_config(run_file, "data.overlong=drop") == {"docs": 0.0, "qa": 25.0}
    steps = stages_config(run_file, "train.tokens=null", "train.steps=2")
    assert steps == {"docs": 2 * 4 * 512 * 0.75 / 10_000, "qa": 2 * 4 * 512 * 0.25 / 1_000}

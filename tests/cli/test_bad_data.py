"""What a user gets wrong beside the configuration: `dsft train` says it in one paragraph, without a traceback.

The cases are started one after the other, each as its own process: most of them are found only by real ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.tokenizers import tiny_tokenizer_folder

pytestmark = [pytest.mark.launch]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def write(folder: Path, tokenizer: Path) -> dict:
    """A valid run over two files of notes."""
    for number in range(2):
        notes = [json.dumps({"text": f"Note {n}: the meeting moved to room {n * 7 % 13}."}) for n in range(20)]
        (folder / f"notes{number}.jsonl").write_text("\n".join(notes) + "\n")
    return {
        "run": {"name": "bad", "dir": "run"},
        "model": {
            "config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
            "tokenizer": str(tokenizer),
            "dtype": "fp32",
        },
        "data": {"pack_tokens": 64, "sources": [{"name": "notes", "path": "notes*.jsonl"}]},
        "train": {"tokens": 500, "global_batch_packs": 2, "lr": 1e-3},
    }


def unreadable_record(folder: Path, config: dict) -> None:
    path = folder / "notes1.jsonl"
    path.write_text(path.read_text().replace('{"text": "Note 3:', '{"text": Note 3:'))


def empty_source(folder: Path, config: dict) -> None:
    for path in folder.glob("notes*.jsonl"):
        path.write_text("")


def missing_source(folder: Path, config: dict) -> None:
    config["data"]["sources"][0]["path"] = "nowhere/*.jsonl"


def no_chat_template(folder: Path, config: dict) -> None:
    config["data"]["sources"][0]["format"] = "messages"


def short_packs(folder: Path, config: dict) -> None:
    config["data"] |= {"pack_tokens": 4, "overlong": "drop"}


def unknown_model(folder: Path, config: dict) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama99"}))
    config["model"] = {"path": "model", "tokenizer": config["model"]["tokenizer"], "dtype": "fp32"}


CASES = {
    unreadable_record: ["notes1.jsonl:4"],
    empty_source: ["notes"],
    missing_source: ["nowhere/*.jsonl"],
    no_chat_template: ["no chat template", "data.chat_template"],
    short_packs: ["too short for every document", "data.pack_tokens = 4"],
    unknown_model: ["transformers", "llama99"],
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_one_paragraph_and_exit_code_2(tmp_path: Path, tokenizer: Path, spoil) -> None:
    config = write(tmp_path, tokenizer)
    spoil(tmp_path, config)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "dsft", "train", "run.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    for part in CASES[spoil]:
        assert part in message
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not list((tmp_path).rglob("*.tmp")), "half-written"
    assert json.loads((tmp_path / "run" / "run_state.json").read_text())["status"] == "failed"


@pytest.mark.timeout(240)
def test_bad_records_can_be_skipped_with_a_count(tmp_path: Path, tokenizer: Path) -> None:
    config = write(tmp_path, tokenizer)
    unreadable_record(tmp_path, config)
    config["data"]["bad_records"] = "skip"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "dsft", "train", "run.yaml", "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "notes1.jsonl" in done.stderr
    assert "1" in done.stderr.split("notes1.jsonl", 1)[1].splitlines()[0]

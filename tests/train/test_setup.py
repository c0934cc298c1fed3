"""What setup writes beside the weights, and where it takes the tokenizer from."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsft.checkpoint.manifest import MANIFEST_NAME
from dsft.config.models import RunConfig
from dsft.corpus.tokenizer import load_tokenizer
from dsft.errors import ModelError
from dsft.train.setup import check_there, open_tokenizer, stop_ids
from tests.support.tokenizers import tiny_tokenizer_folder


def config_with(path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "r", "dir": "runs/r"},
            "model": {"path": str(path)},
            "data": {"pack_tokens": 64, "sources": [{"name": "s", "path": "p"}]},
            "train": {"tokens": 100, "global_batch_packs": 1, "lr": 1e-3},
        }
    )


def test_generation_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    folder = str(tiny_tokenizer_folder(tmp_path))
    plain = load_tokenizer(folder)
    assert stop_ids(plain) == [plain.eos_id]
    chat = load_tokenizer(folder, add_tokens=("<|im_start|>", "<|im_end|>"), chat_template="chatml")
    assert stop_ids(chat) == [chat.eos_id, chat.hf.convert_tokens_to_ids("<|im_end|>")]


def test_a_checkpoints_tokenizer_is_read_without_exporting_its_weights(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST_NAME).write_text("{}")
    tiny_tokenizer_folder(tmp_path).rename(checkpoint / "model")
    config = config_with(checkpoint)
    before = sorted(tmp_path.rglob("*"))
    assert open_tokenizer(config).fingerprint == load_tokenizer(str(checkpoint / "model")).fingerprint
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_with_nothing_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    for there_or_hub in ("models/base", "models", "gpt2", "Qwen/Qwen3-8B", str(tmp_path)):
        check_there("model.path", there_or_hub)
    for wrong in ("models/bse", "./base", "/models/none", "~/base", "runs/sft/hf", "owner/"):
        with pytest.raises(ModelError, match=f"model.path: there is no folder {wrong} .looked from {tmp_path}"):
            check_there("model.path", wrong)

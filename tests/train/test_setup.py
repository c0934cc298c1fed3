"""What setup writes beside the weights."""

from __future__ import annotations

from pathlib import Path

from dsft.corpus.tokenizer import load_tokenizer
from dsft.train.setup import stop_ids
from tests.support.tokenizers import tiny_tokenizer_folder


def test_generation_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    folder = str(tiny_tokenizer_folder(tmp_path))
    plain = load_tokenizer(folder)
    assert stop_ids(plain) == [plain.eos_id]
    chat = load_tokenizer(folder, add_tokens=("<|im_start|>", "<|im_end|>"), chat_template="chatml")
    assert stop_ids(chat) == [chat.eos_id, chat.hf.convert_tokens_to_ids("<|im_end|>")]

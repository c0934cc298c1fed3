from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsft.demo.corpus import read_records
from dsft.demo.tokenizer import VOCAB_TOKENS, make_tokenizer
from tests.support.demo import demo_corpus


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [record["text"] for record in read_records(demo_corpus() / "text" / "train")]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(texts, folder, "a corpus")
    return folder


@pytest.fixture(scope="module")
def hf(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    return tokenizer


def test_the_hugging_face_folder_gives_the_ids_of_sentencepiece(
    folder: Path, hf: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    held_out = [record["text"] for record in read_records(demo_corpus() / "text" / "held_out")]
    odd = ["", " ", "  a    b  ", "\n\n\t x", "naïve 你好 \U0001f600", "tab\tand\r\nline"]
    for text in [*texts[::10], *held_out, *odd]:
        assert hf.encode(text, add_special_tokens=False) == processor.encode(text)


def test_every_text_comes_back(hf: PreTrainedTokenizerFast, texts: list[str]) -> None:
    for text in [*texts[::25], "  two  spaces\n\n    你好 \U0001f600"]:
        assert hf.decode(hf.encode(text, add_special_tokens=False)) == text


def test_special_tokens(hf: PreTrainedTokenizerFast) -> None:
    assert len(hf) == VOCAB_TOKENS
    assert (hf.unk_token_id, hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (0, 1, 2, 3)
    ids = hf.encode("<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (4, 5)


def test_it_is_made_anew_only_for_another_corpus(folder: Path) -> None:
    made = (folder / "tokenizer.model").stat().st_mtime_ns
    make_tokenizer(iter(()), folder, "a corpus")  # would fail if it trained
    assert (folder / "tokenizer.model").stat().st_mtime_ns == made

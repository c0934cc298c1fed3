from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dsft.corpus.tokenizer import Tokenizer, builtin_templates, load_tokenizer, read_chat_template
from dsft.errors import DataError, ModelError
from tests.support.tokenizers import (
    byte_level_folder,
    sentencepiece_folder,
    sentencepiece_model,
    tiny_tokenizer_folder,
    unigram_folder,
)

TEXTS = ["Hello world", "  two  spaces\n\n\ttab", "déjà vu 你好 😀", "x" * 200, "a\r\nb", ""]


def test_text_without_control_tokens_encodes_as_plain_transformers_does(any_tokenizer: Tokenizer) -> None:
    plain = any_tokenizer.hf(TEXTS, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in any_tokenizer.encode_batch(TEXTS)] == plain
    assert [e.ids for e in any_tokenizer.encode_batch_with_offsets(TEXTS)] == plain


def test_text_that_spells_a_control_token_stays_text(any_tokenizer: Tokenizer) -> None:
    text = f"end {any_tokenizer.hf.eos_token} <|im_end|> <s> <unk>x<|im_start|>"
    plain = any_tokenizer.hf(text, add_special_tokens=False)["input_ids"]
    assert any_tokenizer.control.ids & set(plain), "the trap is not set: plain transformers makes control tokens here"
    (ids,) = any_tokenizer.encode_batch([text])
    assert not any_tokenizer.control.ids & set(ids.tolist())
    assert any_tokenizer.decode(ids) == text


def test_unigram_text_that_spells_a_control_token_stays_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(unigram_folder(tmp_path)))
    (ids,) = tokenizer.encode_batch(["a </s> b"])
    assert tokenizer.eos_id not in ids
    assert tokenizer.encode_batch(["plain words"])[0].tolist() == tokenizer.hf.encode(
        "plain words", add_special_tokens=False
    )


def test_affixes_are_what_the_tokenizer_itself_adds(tmp_path: Path, tokenizer_folders: dict[str, str]) -> None:
    with_bos = load_tokenizer(tokenizer_folders["legacy"])
    assert with_bos.prefix_ids == (1,)
    assert with_bos.suffix_ids == (2,)
    gpt = load_tokenizer(str(byte_level_folder(tmp_path, add_bos=True)))
    assert gpt.prefix_ids == (gpt.eos_id,)
    assert gpt.suffix_ids == (gpt.eos_id,)


def test_pad_falls_back_to_eos(base_tokenizer: Tokenizer) -> None:
    assert base_tokenizer.hf.pad_token_id is None
    assert base_tokenizer.pad_id == base_tokenizer.eos_id == 2
    assert base_tokenizer.vocab_tokens == 700


def test_bare_sentencepiece_folder_agrees_with_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    tokenizer = load_tokenizer(str(sentencepiece_folder(tmp_path)))
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    for text in ("Hello world", "déjà vu", "The with statement is used"):
        assert tokenizer.encode_batch([text])[0].tolist() == processor.encode(text)
    assert tokenizer.eos_id == processor.eos_id()


def test_added_tokens_are_words_unless_the_template_writes_them(
    tokenizer_folders: dict[str, str], tmp_path: Path
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ '<turn>' + m['content'] + '</turn>' }}{% endfor %}")
    tokenizer = load_tokenizer(
        tokenizer_folders["sentencepiece"], add_tokens=["aspirin", "<turn>", "</turn>"], chat_template=str(template)
    )
    assert (tokenizer.vocab_tokens, tokenizer.num_added) == (703, 3)
    tokenizer.hf.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"), add_tokens=["aspirin", "<turn>", "new"])
    assert (again.vocab_tokens, again.num_added) == (704, 1)
    vocabulary = tokenizer.hf.get_vocab()
    (ids,) = tokenizer.encode_batch(["take aspirin </turn>"])
    assert vocabulary["aspirin"] in ids
    assert vocabulary["</turn>"] not in ids
    assert vocabulary["</turn>"] in tokenizer.control.ids


def test_fingerprint_follows_what_is_produced(tokenizer_folders: dict[str, str]) -> None:
    folder = tokenizer_folders["sentencepiece"]
    base = load_tokenizer(folder)
    base.hf("state", truncation=True, max_length=2, padding="max_length") if base.hf.pad_token else base.hf("state")
    again = load_tokenizer(folder)
    chat = load_tokenizer(folder, chat_template="chatml")
    words = load_tokenizer(folder, add_tokens=["aspirin"])
    assert base.fingerprint == again.fingerprint
    assert base.text_fingerprint == chat.text_fingerprint
    assert len({base.fingerprint, chat.fingerprint, words.fingerprint}) == 3
    assert base.text_fingerprint != words.text_fingerprint


def test_no_eos_is_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizer_folder(tmp_path)
    hf = AutoTokenizer.from_pretrained(folder)
    hf.eos_token = None
    hf.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ModelError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "no_eos"))


def test_missing_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not be loaded"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_builtin_template_needs_its_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"add them with model.add_tokens: \['<\|im_end\|>', '<\|im_start\|>'\]"):
        load_tokenizer(str(unigram_folder(tmp_path)), chat_template="chatml")
    assert load_tokenizer(
        str(tmp_path / "unigram"), chat_template="chatml", add_tokens=["<|im_start|>", "<|im_end|>"]
    ).chat_template


def test_templates_come_by_name_or_file(tmp_path: Path) -> None:
    assert builtin_templates() == ("chatml",)
    assert "{%- generation %}" in read_chat_template("chatml")
    with pytest.raises(DataError, match="neither a readable file"):
        read_chat_template(str(tmp_path / "no.jinja"))

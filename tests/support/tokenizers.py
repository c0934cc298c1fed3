"""A small real tokenizer for tests, trained here because no test may need a network."""

from __future__ import annotations

import io
import shutil
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

VOCAB_TOKENS = 700


@cache
def sentencepiece_model() -> bytes:
    """A byte-fallback BPE model in the manner of Llama's, of the language reference that CPython carries."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for name in sorted(topics)[::4] for line in topics[name].splitlines() if line),
        model_writer=model,
        vocab_size=VOCAB_TOKENS,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_tokenizer_folder(tmp: Path, *, chat_template: str | None = None) -> Path:
    """A Hugging Face folder with a Llama tokenizer: 700 tokens, <s> 1, </s> 2, no pad token, <|im_start|> and
    <|im_end|> as control tokens, and no chat template unless one is given (then as a base model has none)."""
    from transformers import LlamaTokenizer

    folder = tmp / "tokenizer"
    if folder.exists():
        shutil.rmtree(folder)
    bare = sentencepiece_folder(tmp)
    tokenizer = LlamaTokenizer.from_pretrained(bare)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece_folder(tmp: Path) -> Path:
    """A folder with nothing but ``tokenizer.model``, as sentencepiece leaves it."""
    folder = tmp / "sentencepiece"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder

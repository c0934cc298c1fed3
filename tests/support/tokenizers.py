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


def byte_level_folder(tmp: Path, *, add_bos: bool = False) -> Path:
    """A Hugging Face folder with a byte-level BPE tokenizer as Qwen's: NFC, <|endoftext|>, <|im_start|>, <|im_end|>."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([topics[name] for name in sorted(topics)[::8]], trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", extra_special_tokens=special[1:]
    )
    folder = tmp / "byte_level"
    tokenizer.save_pretrained(folder)
    return folder


def legacy_llama_folder(tmp: Path) -> Path:
    """As Llama 2's: a BOS before every text, and a space before the text after every control token."""
    import json

    folder = tiny_tokenizer_folder(tmp)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["prepend_scheme"] = "always"
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    legacy = tmp / "legacy"
    legacy.mkdir(exist_ok=True)
    (legacy / "tokenizer.json").write_text(json.dumps(definition))
    (legacy / "tokenizer_config.json").write_text(json.dumps(config))
    return legacy


def unigram_folder(tmp: Path) -> Path:
    """A folder with a bare SentencePiece Unigram model (``tokenizer.model`` alone), without byte fallback."""
    import sentencepiece

    folder = tmp / "unigram"
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for name in sorted(topics)[::16] for line in topics[name].splitlines() if line),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="unigram",
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def sentencepiece_folder(tmp: Path) -> Path:
    """A folder with nothing but ``tokenizer.model``, as sentencepiece leaves it."""
    folder = tmp / "sentencepiece"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


def wordpiece_folder(tmp: Path) -> Path:
    """A Hugging Face folder with a tokenizer as BERT's: lower case, [CLS] and [SEP] around a text, [MASK], no EOS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator([topics[name] for name in sorted(topics)[::8]], trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": token for name, token in zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True)}
    folder = tmp / "wordpiece"
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder

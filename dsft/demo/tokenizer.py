"""Trains the demonstration's SentencePiece tokenizer and writes it as a Hugging Face folder.

The folder holds the SentencePiece model itself and a fast tokenizer built from its pieces: byte-pair merges in the
order of the piece scores, with byte fallback. On plain text both give the same ids (a test compares them); the run uses
the Hugging Face one everywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dsft import fsio

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

VOCAB_TOKENS = 4_096
_MAX_TRAINING_BYTES = 4_000_000
_SPACE = "\u2581"
_BORDER = "\u241f"
_NAME_BORDERS = re.compile(r"(?<=\w)(?=[^\w\s])|(?<=[^\w\s])(?=\w)")
"""Between a name and punctuation. No piece spans one, so a name has the same ids wherever it stands; a small model
could not learn to repeat a name from the question otherwise."""
_SPECIAL_TOKENS = ("<|unk|>", "<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
"""Ids 0 to 5, in this order."""


def make_tokenizer(texts: Iterable[str], folder: Path, identity: str) -> None:
    """Train on ``texts`` and write ``folder``, or keep the folder that is there if it was made for ``identity``.

    Args:
        texts: the training split only.
        identity: hash of the training corpus.
    """
    made_for = folder / "made_for.json"
    stamp = {"corpus": identity, "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    if made_for.is_file() and json.loads(made_for.read_bytes()) == stamp:
        return
    folder.mkdir(parents=True, exist_ok=True)
    made_for.unlink(missing_ok=True)
    model = train_sentencepiece(texts)
    fsio.write_bytes(folder / "tokenizer.model", model)
    _save_hugging_face(model, folder)
    fsio.write_json(made_for, stamp)


def train_sentencepiece(texts: Iterable[str]) -> bytes:
    """A byte-pair SentencePiece model of ``VOCAB_TOKENS`` pieces with byte fallback, as its serialised file.

    Nothing is normalised and white space is kept, runs of spaces included, so that programs survive a round trip.
    """
    import sentencepiece

    model = io.BytesIO()
    unk, bos, eos, pad, *control = _SPECIAL_TOKENS
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_TOKENS,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pretokenization_delimiter=_BORDER,
        character_coverage=0.9995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=unk,
        bos_piece=bos,
        eos_piece=eos,
        pad_piece=pad,
        control_symbols=control,
        num_threads=1,  # the same model on every machine
        minloglevel=1,
    )
    return model.getvalue()


def fast_tokenizer(processor: SentencePieceProcessor) -> Tokenizer:
    """The same pieces as a ``tokenizers`` byte-pair model.

    SentencePiece merges, at each step, the neighbours whose union has the best score. So every way to make a piece of
    two others is a merge, and merges are ranked by the score of what they make.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    scores = {piece: processor.get_score(number) for number, piece in enumerate(pieces)}
    mergeable = {p for i, p in enumerate(pieces) if not (processor.is_control(i) or processor.is_byte(i)) and i != 0}
    ranked = sorted((piece for piece in mergeable if len(piece) > 1), key=lambda piece: -scores[piece])
    merges = [
        (piece[:split], piece[split:])
        for piece in ranked
        for split in range(1, len(piece))
        if piece[:split] in mergeable and piece[split:] in mergeable
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=pieces[0], byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    return tokenizer


def _save_hugging_face(model: bytes, folder: Path) -> None:
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    unk, bos, eos, pad, *_control = _SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(processor),
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        model_max_length=4_096,
    ).save_pretrained(folder)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts, up to a few megabytes: enough for 4,096 pieces, and seconds instead of minutes."""
    size = 0
    for text in texts:
        yield from (_NAME_BORDERS.sub(_BORDER, line) for line in text.replace(_BORDER, " ").split("\n"))
        size += len(text)
        if size > _MAX_TRAINING_BYTES:
            return

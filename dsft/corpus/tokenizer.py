"""Loads a tokenizer and wraps what the corpus layer needs of it."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dsft.corpus.control_tokens import ControlTokens
from dsft.errors import DataError, ModelError

_PROBE = "Hello, world! It's 12.5 °C;\n\tdéjà vu — 你好 \U0001f600  two  spaces.\r\n"
"""Text whose encoding goes into the fingerprint: case, digits, accents, scripts, emoji, runs of spaces, line ends."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as dsft uses it.

    Attributes:
        hf: the transformers tokenizer, with ``chat_template`` set; for decoding and for export.
        fingerprint: hash of what it produces, the chat template included.
        text_fingerprint: the same without the chat template (raw text does not depend on it).
        eos_id: end of a document; the separator where the tokenizer has no EOS (BERT's).
        pad_id: padding; ``eos_id`` where the tokenizer has none.
        prefix_ids: what the tokenizer itself puts before a text (usually the BOS token, or nothing).
        suffix_ids: what goes after a document: what the tokenizer itself puts there, then EOS unless that was it.
        vocab_tokens: highest id + 1.
        num_added: tokens of ``add_tokens`` that it did not have; they have the last ids.
        chat_template: Jinja source, or None.
        control: the special tokens.
    """

    hf: Any
    fingerprint: str
    text_fingerprint: str
    eos_id: int
    pad_id: int
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    vocab_tokens: int
    num_added: int
    chat_template: str | None
    control: ControlTokens
    backend: Backend

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Ids of each text, int32[n]; nothing is added, and only what is privately spelled becomes a control token."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = (encoding.ids for encoding in encodings)  # a new list at each access
        # struct takes half the time of np.fromiter for a list of ints, and a sixth of the tokenizer's own goes here.
        return [np.frombuffer(struct.pack(f"{len(of_text)}i", *of_text), np.int32) for of_text in ids]

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        """As :meth:`encode_batch`, with each token's character range (``ids`` and ``offsets``)."""
        return self.backend.encode_batch(texts, add_special_tokens=False)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.int32]) -> str:
        """Text of the ids, control tokens included."""
        listed = ids.tolist() if isinstance(ids, np.ndarray) else [int(token) for token in ids]
        return str(self.hf.backend_tokenizer.decode(listed, skip_special_tokens=False))

    def decode_inside(self, ids: npt.NDArray[np.int32], start: int, end: int) -> str:
        """Text of tokens ``[start, end)`` where they stand (a decoder treats the first token of all differently)."""
        context = max(start - 1, 0)
        whole = self.decode(ids[context:end])
        head = self.decode(ids[context:start]) if start else ""
        return whole[len(head) :] if whole.startswith(head) else whole


def load_tokenizer(
    path: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    add_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    sentinels: Sequence[str] = (),
) -> Tokenizer:
    """Load a tokenizer from a Hugging Face folder, a hub name, or a folder with a bare SentencePiece model.

    Args:
        path: folder or hub name.
        revision: hub revision.
        trust_remote_code: passed to transformers.
        add_tokens: tokens to add. One that the chat template writes becomes a special token; the others are words.
        chat_template: Jinja file or the name of a built-in template; None keeps the tokenizer's own, if it has one.
        sentinels: tokens that dsft will put between others; they are control tokens, whatever the tokenizer says.

    Raises:
        ModelError: not a tokenizer, one without EOS, or one that the tokenizers library does not back.
        DataError: the chat template cannot be read, or needs tokens that the tokenizer does not have;
            or a sentinel is not one of its tokens.
    """
    hf = _load_hf(path, revision, trust_remote_code)
    template = _own_template(hf, path) if chat_template is None else read_chat_template(chat_template)
    hf.chat_template = template
    num_added = _add_tokens(hf, add_tokens, template or "")
    eos_id = hf.sep_token_id if hf.eos_token_id is None else hf.eos_token_id  # BERT's tokenizers end a text with [SEP]
    if eos_id is None:
        raise ModelError(
            f"The tokenizer {path} has no end-of-text token, so documents could not be told apart; set "
            f"`eos_token` in its tokenizer_config.json."
        )
    special = {
        token.content: token_id
        for token_id, token in hf.added_tokens_decoder.items()
        if (token.special or token.content in sentinels) and token.content
    }
    if missing := [token for token in sentinels if token not in special]:
        raise DataError(
            f"objective fim: the tokenizer {path} has no token {', '.join(missing)}. Name its own sentinels in "
            f"objective (prefix, suffix, middle), or add these with model.add_tokens: {missing}."
        )
    control = ControlTokens(special)
    backend = control.renamed_backend(hf.backend_tokenizer)
    prefix, suffix = _affixes(hf, backend, path)
    if not suffix or suffix[-1] != eos_id:
        suffix = (*suffix, eos_id)
    if chat_template is not None and chat_template in builtin_templates():
        _check_template_tokens(chat_template, template or "", special, path)
    text_fingerprint = _fingerprint(hf, prefix, suffix, sentinels)
    return Tokenizer(
        hf=hf,
        fingerprint=hashlib.sha256(f"{text_fingerprint}\n{template}".encode()).hexdigest()[:32],
        text_fingerprint=text_fingerprint,
        eos_id=eos_id,
        pad_id=eos_id if hf.pad_token_id is None else hf.pad_token_id,
        prefix_ids=prefix,
        suffix_ids=suffix,
        vocab_tokens=1 + max(hf.get_vocab().values()),
        num_added=num_added,
        chat_template=template,
        control=control,
        backend=backend,
    )


def builtin_templates() -> tuple[str, ...]:
    """Names of the chat templates that dsft carries."""
    folder = resources.files("dsft.corpus").joinpath("templates")
    return tuple(sorted(entry.name[: -len(".jinja")] for entry in folder.iterdir() if entry.name.endswith(".jinja")))


def read_chat_template(name_or_path: str) -> str:
    """The Jinja source of a built-in template or of a file. Raises DataError where there is neither."""
    if name_or_path in builtin_templates():
        return resources.files("dsft.corpus").joinpath("templates", f"{name_or_path}.jinja").read_text("utf-8")
    try:
        return Path(name_or_path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(builtin_templates())
        raise DataError(
            f"data.chat_template: {name_or_path!r} is neither a readable file ({error}) nor a built-in template "
            f"({names})."
        ) from error


def _load_hf(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    folder = Path(path)
    try:
        if _is_bare_sentencepiece(folder):
            hf = _load_sentencepiece(folder)
        else:
            hf = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"The tokenizer {path} could not be loaded: {reason} Give model.tokenizer a folder with tokenizer.json, a "
            "folder with a SentencePiece tokenizer.model, or a hub name."
        ) from error
    if not isinstance(getattr(hf, "backend_tokenizer", None), Backend):
        raise ModelError(
            f"The tokenizer {path} ({type(hf).__name__}) runs in Python only. dsft needs one that the "
            f"tokenizers library backs (tokenizer.json): convert it once with transformers and save it."
        )
    return hf


def _is_bare_sentencepiece(folder: Path) -> bool:
    others = ("tokenizer.json", "tokenizer_config.json", "config.json")
    return (folder / "tokenizer.model").is_file() and not any((folder / name).exists() for name in others)


def _load_sentencepiece(folder: Path) -> Any:
    """Convert a bare model. transformers' general conversion forgets SentencePiece's dummy prefix (the space before the
    first word), and its Llama one knows BPE models only; take what agrees with sentencepiece itself on plain words."""
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    names = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    special = {key: processor.id_to_piece(token_id) for key, token_id in names.items() if token_id >= 0}
    words = "These are plain words"
    expected = processor.encode(words)
    for loader in (LlamaTokenizer, AutoTokenizer):
        hf = loader.from_pretrained(folder, **special)
        if hf.encode(words, add_special_tokens=False) == expected:
            return hf
    hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    hf.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    if hf.encode(words, add_special_tokens=False) == expected:
        return hf
    raise ValueError("transformers' conversion of this SentencePiece model gives other ids than sentencepiece itself.")


def _own_template(hf: Any, path: str) -> str | None:
    template = hf.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise DataError(
                f"The tokenizer {path} has several chat templates ({', '.join(sorted(template))}) and none is called "
                "default; write the one you mean to a file and name it in data.chat_template."
            )
        template = template["default"]
    return None if template is None else str(template)


def _add_tokens(hf: Any, tokens: Sequence[str], template: str) -> int:
    """Add what is missing; how many tokens are new (one that was a word and becomes special is not)."""
    from tokenizers import AddedToken

    known = hf.get_vocab()
    special = set(hf.all_special_tokens)
    added = [
        AddedToken(token, special=token in template, normalized=False)
        for token in tokens
        if token not in known or (token in template and token not in special)
    ]
    hf.add_tokens([token for token in added if not token.special])
    hf.add_tokens([token for token in added if token.special], special_tokens=True)
    return len({token.content for token in added} - set(known))


def _affixes(hf: Any, backend: Backend, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer adds before and after a text; also proves that the renamed copy encodes as the original."""
    plain = hf.encode(_PROBE, add_special_tokens=False)
    renamed = backend.encode(_PROBE, add_special_tokens=False).ids
    full = hf.encode(_PROBE, add_special_tokens=True)
    for start in range(len(full) - len(plain) + 1):
        if plain == renamed and full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    raise ModelError(
        f"The tokenizer {path} ({type(hf).__name__}) encodes text in a way that its tokenizer.json does not "
        f"describe, so control tokens could not be kept apart from text; this tokenizer is not supported."
    )


def _check_template_tokens(name: str, template: str, special: dict[str, int], path: str) -> None:
    needed = sorted(set(re.findall(r"<\|\w+\|>", template)))
    missing = [token for token in needed if token not in special]
    if missing:
        raise DataError(
            f"data.chat_template: {name} marks turns with {', '.join(needed)}, and the tokenizer {path} does not have "
            f"{', '.join(missing)} as special tokens; add them with model.add_tokens: {missing}."
        )


def _fingerprint(hf: Any, prefix: tuple[int, ...], suffix: tuple[int, ...], sentinels: Sequence[str]) -> str:
    definition = json.loads(hf.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # set by the last call, not part of the tokenizer
        definition.pop(state, None)
    content = [definition, prefix, suffix, hf.eos_token_id, hf.pad_token_id, hf.encode(_PROBE)]
    content += [sorted(sentinels)] if sentinels else []
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

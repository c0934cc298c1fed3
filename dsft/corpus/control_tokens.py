"""A copy of a tokenizer in which no text can spell a control token.

Text may contain ``</s>`` or ``<|im_end|>``; encoded naively that becomes the control token itself, and a user's words
end the turn. Here every special token is renamed, under the same id, to a spelling between two Unicode noncharacters
that no interchanged text may hold. What dsft itself writes as a control token is spelled that way, and everything else,
whatever it says, is ordinary text. One encoding of the whole text does it all, so merges and leading-space rules at the
borders are those of the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_SPELLING = re.compile(f"{_OPEN}[0-9]+{_CLOSE}")
_RESERVED = re.compile("[\ufdd0-\ufdd5]")


class ControlTokens:
    """The special tokens of one tokenizer and their private spellings.

    Args:
        special: token text -> id.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self.ids = frozenset(special.values())
        self._id_of = dict(special)
        self._private = {text: f"{_OPEN}{token_id}{_CLOSE}" for text, token_id in special.items()}
        longest_first = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def respell(self, template_text: str) -> str:
        """Text that a chat template wrote, with each control token in its private spelling."""
        return self._pattern.sub(lambda match: self._private[match.group()], template_text)

    def first_end(self, template_text: str) -> int | None:
        """Where the first control token in ``template_text`` ends; None where there is none."""
        match = self._pattern.search(template_text)
        return None if match is None else match.end()

    def ids_in(self, template_text: str) -> list[int]:
        """Ids of the control tokens in ``template_text``, in order."""
        return [self._id_of[text] for text in self._pattern.findall(template_text)]

    def id_of(self, text: str) -> int:
        """The id of a control token."""
        return self._id_of[text]

    def spelled_in(self, text: str) -> list[str]:
        """The control tokens that a text spells, in order."""
        return self._pattern.findall(text)

    def removed_from(self, template_text: str) -> str:
        """Text that a chat template wrote, without its control tokens."""
        return self._pattern.sub("", template_text)

    def renamed_backend(self, backend: Backend) -> Backend:
        """The copy: same ids, same rules, private spellings; no truncation, padding or post-processing."""
        definition: dict[str, Any] = json.loads(backend.to_str())
        definition.update(truncation=None, padding=None, post_processor=None)
        for token in definition["added_tokens"]:
            if token["content"] in self._private:
                token.update(content=self._private[token["content"]], normalized=False)
        model = definition["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._private.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
        else:  # Unigram: a list of [piece, score]
            model["vocab"] = [[self._private.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in self._private:
            model["unk_token"] = self._private[model["unk_token"]]
        return Backend.from_str(json.dumps(definition, ensure_ascii=False))


def has_private_spelling(text: str) -> bool:
    """True where a text holds the private spelling of a control token."""
    return _OPEN in text and _SPELLING.search(text) is not None


def has_reserved_character(text: str) -> bool:
    """True where a text holds a noncharacter that dsft uses in conversations (U+FDD0 to U+FDD5)."""
    return _RESERVED.search(text) is not None

"""From a conversation to text in which every character's origin is known, and the parts of it that are learned.

A template's text and the messages' text are told apart by rendering the same roles once more with a placeholder for
each message (the skeleton). Where the real rendering is exactly the skeleton with the messages put in, positions are
certain. Templates that treat some contents specially (reasoning blocks, for one) are accepted only where each message
still stands in the text exactly once. All else is refused: templates that drop, repeat, reorder or change messages.

The assistant's part of a turn runs from its first character to its end of turn: the template's text after it, up to and
with the first control token. Generation markers, where the template has them, must cover exactly that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import jinja2

from dsft.corpus.formats import BadRecord, Conversation, Message
from dsft.corpus.template import ChatTemplate, Rendering
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DataError

Supervise = Literal["assistant", "last_assistant", "all"]

_PLACEHOLDER = re.compile("\ufdd4([0-9]+)\ufdd5")
_STRUCTURES = 4096
"""Skeletons kept: one for each sequence of roles."""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a text with its own loss weight.

    Attributes:
        start, end: characters of ``MarkedText.text``.
        said: the same part as the tokens must decode to (control tokens spelled as the tokenizer spells them).
        weight: factor in the loss; 0 means not learned.
        where: the part's name for messages, such as ``messages[1]``.
    """

    start: int
    end: int
    said: str
    weight: float
    where: str


@dataclass(frozen=True, slots=True)
class MarkedText:
    """Text ready to be encoded.

    Attributes:
        text: control tokens that dsft or the template wrote are privately spelled; all else is plain text.
        regions: ascending, disjoint.
        learn_rest: what lies in no region is learned with weight 1 (else it is not learned).
        add_affixes: the document begins and ends as a raw text does (BOS where the tokenizer adds it, EOS).
        num_bytes: UTF-8 bytes of the learned text, control tokens left out.
    """

    text: str
    regions: tuple[Region, ...]
    learn_rest: bool
    add_affixes: bool
    num_bytes: int


class ChatMarker:
    """Marks conversations with one chat template.

    Raises:
        DataError: there is no chat template, or it is not valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                "The tokenizer has no chat template (base models have none) and the data are conversations; set "
                "data.chat_template to a Jinja file or to a built-in template (chatml)."
            )
        try:
            self._template = ChatTemplate(tokenizer.chat_template, template_variables(tokenizer))
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"The chat template is not valid Jinja: line {error.lineno}: {error.message}.") from error
        self._control = tokenizer.control
        self._skeleton = lru_cache(maxsize=_STRUCTURES)(self._make_skeleton)
        self._end_of_turn = lru_cache(maxsize=_STRUCTURES)(self._make_end_of_turn)

    def mark(self, conversation: Conversation, supervise: Supervise) -> MarkedText:
        """Render a conversation and find what is learned.

        Raises:
            BadRecord: the template refuses the conversation, or does not keep what its messages say.
        """
        messages = conversation.messages
        roles = tuple(message.role for message in messages)
        rendering = self._template.render(_template_messages(roles, [message.content for message in messages]))
        contents, pieces = self._align(rendering, messages, self._skeleton(roles))
        text = [self._control.respell(pieces[0])]
        regions: list[Region] = []
        position, marked_position, num_bytes = len(pieces[0]), len(text[0]), 0
        for number, weight in enumerate(message_weights(messages, supervise)):
            content, tail = contents[number], pieces[number + 1]
            if weight is not None:
                end_of_turn = ""
                if messages[number].role == "assistant" or messages[number].train:
                    end_of_turn = self._checked_end_of_turn(rendering, roles, number, position, content, tail)
                end = marked_position + len(content) + len(self._control.respell(end_of_turn))
                regions.append(Region(marked_position, end, content + end_of_turn, weight, f"messages[{number}]"))
                num_bytes += len(content.encode()) if weight else 0
            text += [content, self._control.respell(tail)]
            position += len(content) + len(tail)
            marked_position += len(content) + len(text[-1])
        return MarkedText("".join(text), tuple(regions), supervise == "all", False, num_bytes)

    def end_of_turn_id(self) -> int | None:
        """The control token that ends an assistant's turn; None where the template ends turns with plain text."""
        ids = self._control.ids_in(self._end_of_turn(("user", "assistant"), 1))
        return ids[-1] if ids else None

    def _align(
        self, rendering: Rendering, messages: Sequence[Message], skeleton: tuple[str, ...]
    ) -> tuple[list[str], tuple[str, ...]]:
        """Each message's text as the template wrote it, and the template's own text around them."""
        exact = [message.content for message in messages]
        trimmed = [m.content if m.role == "assistant" else m.content.strip() for m in messages]
        for contents in (exact, trimmed):
            if rendering.text == _interleave(skeleton, contents):
                return contents, skeleton
        pieces, position = [], 0
        for number, content in enumerate(trimmed):
            if not content or rendering.text.count(content) != 1 or rendering.text.find(content) < position:
                raise BadRecord(
                    f"the chat template does not write messages[{number}] ({messages[number].role}) exactly as "
                    f"it is: it changes, trims, drops or repeats text. Change the data or give another "
                    f"data.chat_template"
                )
            start = rendering.text.index(content)
            pieces.append(rendering.text[position:start])
            position = start + len(content)
        return trimmed, (*pieces, rendering.text[position:])

    def _checked_end_of_turn(
        self, rendering: Rendering, roles: tuple[str, ...], number: int, position: int, content: str, tail: str
    ) -> str:
        """The end of turn of a message that stands at ``position`` of the rendering and is followed by ``tail``."""
        end_of_turn = self._end_of_turn(roles, number)
        if not end_of_turn or not tail.startswith(end_of_turn):
            raise BadRecord(
                f"the chat template writes nothing after messages[{number}] ({roles[number]}) that could end "
                f"its turn, so the model would never learn to stop"
            )
        if self._template.has_markers and roles[number] == "assistant":
            end = position + len(content) + len(end_of_turn)
            blocks = [block for block in rendering.generated if block[0] <= position < block[1]]
            if not blocks:
                raise BadRecord(f"the chat template's generation markers leave out messages[{number}]")
            if blocks[0][1] < end:
                raise BadRecord(
                    f"the chat template's generation block for messages[{number}] ends before the end of turn "
                    f"{end_of_turn!r}, so the model would never learn to stop; move {{% endgeneration %}} after it"
                )
        return end_of_turn

    def _make_skeleton(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """The template's text before, between and after the messages of these roles: ``len(roles) + 1`` pieces."""
        placeholders = [f"\ufdd4{number}\ufdd5" for number in range(len(roles))]
        text = self._template.render(_template_messages(roles, placeholders)).text
        pieces = _PLACEHOLDER.split(text)
        if pieces[1::2] != [str(number) for number in range(len(roles))]:
            missing = [number for number in range(len(roles)) if placeholders[number] not in text]
            problem = (
                f"drops messages[{missing[0]}] ({roles[missing[0]]})" if missing else "repeats or reorders messages"
            )
            raise BadRecord(f"the chat template {problem}, so what was written there would be lost or learned twice")
        return tuple(pieces[0::2])

    def _make_end_of_turn(self, roles: tuple[str, ...], number: int) -> str:
        """What ends the turn of message ``number``: what the template writes after it whether or not the conversation
        goes on, up to and with the first control token (all of it where there is none)."""
        after = self._skeleton(roles)[number + 1]
        at_end = self._skeleton(roles[: number + 1])[number + 1]
        common = _common_prefix(after, at_end)
        return common[: self._control.first_end(common)]


def message_weights(messages: Sequence[Message], supervise: Supervise) -> list[float | None]:
    """The loss weight of each message; None where it is not learned (with ``all``: 0, as the rest is learned)."""
    assistants = [number for number, message in enumerate(messages) if message.role == "assistant"]
    chosen = {
        "assistant": assistants,
        "last_assistant": assistants[-1:],
        "all": list(range(len(messages))),
    }[supervise]
    weights: list[float | None] = []
    for number, message in enumerate(messages):
        learned = message.train if message.train is not None else number in chosen
        weight = message.loss_weight if learned else 0.0
        weights.append(weight if weight or supervise == "all" else None)
    return weights


def mark_completion(prompt: str, completion: str) -> MarkedText:
    """A prompt and its completion as plain text; the completion and the EOS after it are learned."""
    region = Region(len(prompt), len(prompt) + len(completion), completion, 1.0, "the completion")
    return MarkedText(prompt + completion, (region,), False, True, len(completion.encode()))


def template_variables(tokenizer: Tokenizer) -> Mapping[str, str]:
    """What a chat template sees of its tokenizer: ``bos_token``, ``eos_token`` and the like."""
    return {name: str(text) for name, text in tokenizer.hf.special_tokens_map.items() if isinstance(text, str)}


def _template_messages(roles: Sequence[str], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _common_prefix(first: str, second: str) -> str:
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return first[:length]


def _interleave(pieces: Sequence[str], contents: Sequence[str]) -> str:
    parts = [pieces[0]]
    for content, piece in zip(contents, pieces[1:], strict=True):
        parts += [content, piece]
    return "".join(parts)

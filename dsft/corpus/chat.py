"""From a conversation to text in which every character's origin is known, and the parts of it that are learned.

A template's text and the messages' text are told apart by rendering the same roles once more with a placeholder for
each message (the skeleton). Where the real rendering is exactly the skeleton with the messages put in, positions are
certain. Templates that treat some contents specially (reasoning blocks, for one) are accepted only where each message
still stands in the text exactly once. All else is refused: templates that drop, repeat, reorder or change messages.

The assistant's part of a turn runs from its first character to its end of turn: the template's text after it, up to and
with the first control token; the tool calls of a message are part of it. Generation markers, where the template has
them, must cover exactly that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import jinja2

from dsft.corpus.samples import BadRecord, Conversation, Message
from dsft.corpus.structure import Structure, Turn, check_extra, check_tools, structure_of
from dsft.corpus.template import ChatTemplate, Rendering
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DataError

Supervise = Literal["assistant", "last_assistant", "all"]

_PLACEHOLDER = re.compile("\ufdd4([0-9]+)\ufdd5")
_STRUCTURES = 4096
"""Skeletons kept: one for each sequence of roles (and of tool calls, which are seldom the same twice)."""


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
        self._ending = lru_cache(maxsize=_STRUCTURES)(self._make_ending)

    def mark(self, conversation: Conversation, supervise: Supervise) -> MarkedText:
        """Render a conversation and find what is learned.

        Raises:
            BadRecord: the template refuses the conversation, or does not keep what its messages say.
        """
        messages, structure = conversation.messages, structure_of(conversation)
        self._refuse_control_tokens(structure)
        rendering = self._template.render(
            structure.messages([message.content for message in messages]), structure.parsed_tools
        )
        contents, pieces = self._align(rendering, messages, self._skeleton(structure))
        check_tools(structure, rendering.text)
        text = [self._control.respell(pieces[0])]
        regions: list[Region] = []
        position, marked_position, num_bytes = len(pieces[0]), len(text[0]), 0
        for number, weight in enumerate(message_weights(messages, supervise)):
            content, tail = contents[number], pieces[number + 1]
            check_extra(structure.turns[number], number, pieces[number], tail)
            if weight is not None:
                ending = ""
                if messages[number].role == "assistant" or messages[number].train:
                    ending = self._checked_ending(rendering, structure, number, position, content, tail)
                end = marked_position + len(content) + len(self._control.respell(ending))
                regions.append(Region(marked_position, end, content + ending, weight, f"messages[{number}]"))
                learned = content
                if structure.turns[number].has_calls:
                    learned += self._control.removed_from(ending)
                num_bytes += len(learned.encode()) if weight else 0
            text += [content, self._control.respell(tail)]
            position += len(content) + len(tail)
            marked_position += len(content) + len(text[-1])
        return MarkedText("".join(text), tuple(regions), supervise == "all", False, num_bytes)

    def end_of_turn_id(self) -> int | None:
        """The control token that ends an assistant's turn; None where the template ends turns with plain text."""
        ids = self._control.ids_in(self._ending(Structure((Turn("user"), Turn("assistant"))), 1))
        return ids[-1] if ids else None

    def _align(
        self, rendering: Rendering, messages: Sequence[Message], skeleton: tuple[str, ...]
    ) -> tuple[list[str], tuple[str, ...]]:
        """Each message's text as the template wrote it, and the template's own text around them."""
        exact = [message.content for message in messages]
        trimmed = [m.content if m.role == "assistant" else m.content.strip() for m in messages]
        escaped = [  # some templates write a tool's answer as JSON
            json.dumps(m.content, ensure_ascii=False)[1:-1] if m.role == "tool" else content
            for m, content in zip(messages, trimmed, strict=True)
        ]
        for contents in (exact, trimmed, escaped):
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

    def _checked_ending(
        self, rendering: Rendering, structure: Structure, number: int, position: int, content: str, tail: str
    ) -> str:
        """What the template writes after a message that is learned with it: its tool calls and its end of turn.

        Args:
            position: of the message in the rendering; ``tail`` follows it there.
        """
        role, ending = structure.turns[number].role, self._ending(structure, number)
        if not ending or not tail.startswith(ending):
            raise BadRecord(
                f"the chat template writes nothing after messages[{number}] ({role}) that could end "
                f"its turn, so the model would never learn to stop"
            )
        if self._template.has_markers and role == "assistant":
            end = position + len(content) + len(ending)
            blocks = [block for block in rendering.generated if block[0] <= position < block[1]]
            if not blocks:
                raise BadRecord(f"the chat template's generation markers leave out messages[{number}]")
            if blocks[0][1] < end:
                raise BadRecord(
                    f"the chat template's generation block for messages[{number}] ends before the end of turn "
                    f"{ending!r}, so the model would never learn to stop; move {{% endgeneration %}} after it"
                )
        return ending

    def _refuse_control_tokens(self, structure: Structure) -> None:
        """Names, tool calls and tools become part of the template's own text, in which control tokens are real."""
        for where, written in [
            *((f"messages[{number}]", turn.extra) for number, turn in enumerate(structure.turns)),
            ("the tools", structure.tools),
        ]:
            if found := self._control.spelled_in(written):
                raise BadRecord(f"a name, call or schema of {where} spells the control token {found[0]!r}")

    def _make_skeleton(self, structure: Structure) -> tuple[str, ...]:
        """The template's text before, between and after the contents of these turns: ``len(turns) + 1`` pieces."""
        turns = structure.turns
        placeholders = [f"\ufdd4{number}\ufdd5" for number in range(len(turns))]
        shown = ["" if turn.is_empty else mark for turn, mark in zip(turns, placeholders, strict=True)]
        text = self._template.render(structure.messages(shown), structure.parsed_tools).text
        for number in (number for number, turn in enumerate(turns) if turn.is_empty):
            start = self._start_of(structure, number, text)
            text = text[:start] + placeholders[number] + text[start:]
        pieces = _PLACEHOLDER.split(text)
        if pieces[1::2] != [str(number) for number in range(len(turns))]:
            missing = [number for number in range(len(turns)) if placeholders[number] not in text]
            problem = (
                f"drops messages[{missing[0]}] ({turns[missing[0]].role})"
                if missing
                else "repeats or reorders messages"
            )
            raise BadRecord(f"the chat template {problem}, so what was written there would be lost or learned twice")
        return tuple(pieces[0::2])

    def _start_of(self, structure: Structure, number: int, text: str) -> int:
        """Where a turn without content begins in a skeleton's text: where its content would begin."""
        pieces = self._skeleton(structure.plain(number))
        marks = [f"\ufdd4{earlier}\ufdd5" for earlier in range(number)]
        header = _interleave(pieces[: number + 1], marks)
        start = len(_common_prefix(header, text))
        if start < len(header.rstrip()):
            raise BadRecord(f"it cannot be told where messages[{number}], which has only tool calls, begins")
        return start

    def _make_ending(self, structure: Structure, number: int) -> str:
        """What ends the turn of message ``number``: what the template writes after it whether or not the conversation
        goes on, up to and with the first control token (all of it where there is none). Where the message calls tools:
        up to and with the control token that ends a turn without calls."""
        after = self._skeleton(structure)[number + 1]
        at_end = self._skeleton(structure.until(number))[number + 1]
        common = _common_prefix(after, at_end)
        if not structure.turns[number].has_calls:
            return common[: self._control.first_end(common)]
        tokens = self._control.spelled_in(self._ending(structure.plain(number), number))
        if not tokens:
            return common
        return common[: common.find(tokens[-1]) + len(tokens[-1])] if tokens[-1] in common else ""


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

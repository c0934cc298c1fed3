"""All of a conversation but its contents: roles, names, tool calls and tools, and whether a template kept them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dsft.corpus.samples import BadRecord, Conversation


@dataclass(frozen=True)
class Turn:
    """A message without its content.

    Attributes:
        role: as the chat template knows it.
        extra: name, tool call id and tool calls as JSON; empty where there is none of them.
        is_empty: there is no content, only tool calls.
    """

    role: str
    extra: str = ""
    is_empty: bool = False

    @property
    def has_calls(self) -> bool:
        """The message calls tools."""
        return '"tool_calls"' in self.extra


@dataclass(frozen=True)
class Structure:
    """The turns of a conversation, and its tools as JSON (empty: none). Hashable: the key of what is kept for it."""

    turns: tuple[Turn, ...]
    tools: str = ""

    @cached_property
    def parsed_tools(self) -> list[dict[str, Any]] | None:
        """The tools as a chat template sees them."""
        return json.loads(self.tools) if self.tools else None

    def messages(self, contents: Sequence[str]) -> list[dict[str, Any]]:
        """Messages with these contents, as a chat template sees them."""
        return [
            {"role": turn.role, "content": content, **(json.loads(turn.extra) if turn.extra else {})}
            for turn, content in zip(self.turns, contents, strict=True)
        ]

    def until(self, number: int) -> Structure:
        """The turns up to and with ``number``."""
        return replace(self, turns=self.turns[: number + 1])

    def plain(self, number: int) -> Structure:
        """The turns up to and with ``number``, that one with a content and without tool calls."""
        return replace(self, turns=(*self.turns[:number], Turn(self.turns[number].role)))


def structure_of(conversation: Conversation) -> Structure:
    """What a conversation is apart from its contents."""
    turns = []
    for message in conversation.messages:
        extra: dict[str, Any] = {}
        if message.name is not None:
            extra["name"] = message.name
        if message.tool_call_id is not None:
            extra["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            extra["tool_calls"] = list(message.tool_calls)
        written = json.dumps(extra, ensure_ascii=False) if extra else ""
        turns.append(Turn(message.role, written, not message.content and bool(message.tool_calls)))
    tools = json.dumps(list(conversation.tools), ensure_ascii=False) if conversation.tools else ""
    return Structure(tuple(turns), tools)


def check_tools(structure: Structure, text: str) -> None:
    """Raise BadRecord where a rendering leaves out a tool's name, its description or one of its parameters."""
    for said in _described(structure.parsed_tools):
        if not _is_in(said, text):
            raise BadRecord(
                f"the chat template drops the tools: {said[:40]!r} is not in its text, so the model would not learn "
                "what it may call. Give another data.chat_template"
            )


def check_extra(turn: Turn, number: int, before: str, after: str) -> None:
    """Raise BadRecord where a template leaves out a speaker's name (``before`` the content) or a tool call (after it).

    Ids of calls and the name of a tool that answers only link messages; templates may leave them out.
    """
    if not turn.extra:
        return
    extra = json.loads(turn.extra)
    name = extra.get("name")
    if name is not None and turn.role != "tool" and not _is_in(name, before):
        raise BadRecord(f"the chat template drops the name {name!r} of messages[{number}] ({turn.role})")
    for call in extra.get("tool_calls", ()):
        for said in _leaves(call["function"]):
            if not _is_in(said, after):
                raise BadRecord(
                    f"the chat template drops tool_calls of messages[{number}]: {said[:40]!r} is not in its text. Give "
                    "another data.chat_template"
                )


def _described(value: Any) -> Iterator[str]:
    """Names, descriptions and parameter names anywhere in tool schemas."""
    if isinstance(value, list):
        for item in value:
            yield from _described(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("name", "description") and isinstance(item, str):
                yield item
            elif key == "properties" and isinstance(item, Mapping):
                yield from item
            yield from _described(item)


def _leaves(value: Any) -> Iterator[str]:
    """Keys below ``arguments``, strings, numbers and truth values of a call, as text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("name", "arguments"):
                yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _is_in(said: str, text: str) -> bool:
    """Whether a text holds a string, as it is or as JSON writes it (or as Python writes true and false)."""
    if said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text:
        return True
    return said in ("true", "false") and said.capitalize() in text

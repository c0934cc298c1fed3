"""From a record, as the file has it, to a sample: a text, a prompt with its completion, or a conversation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["text", "messages", "prompt_completion"]

_UNSUPPORTED_MESSAGE_KEYS = (
    "tool_calls", "tool_call_id", "function_call", "name", "reasoning_content", "reasoning", "thinking", "weight",
)  # fmt: skip
_UNSUPPORTED_RECORD_KEYS = ("tools", "functions", "documents")


class BadRecord(Exception):  # noqa: N818  (a finding about the data; becomes a DataError or a count, by policy)
    """A record that cannot be used; the message says why, the caller knows where."""


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text, learned whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it, as plain text; only the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: as the chat template knows it.
        content: its text.
        train: True or False where the data says so; None leaves it to ``supervise``.
        loss_weight: factor in the loss, >= 0; 0 means not learned.
    """

    role: str
    content: str
    train: bool | None = None
    loss_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template."""

    messages: tuple[Message, ...]


Sample = Text | Completion | Conversation


def parse_record(record: Any, record_format: Format, text_field: str, has_chat_template: bool) -> Sample:
    """Turn one record into a sample.

    Args:
        record: what the file holds; should be a mapping.
        record_format: ``text``, ``messages`` or ``prompt_completion``.
        text_field: name of the field with the text (``text`` only).
        has_chat_template: with one, a prompt and a completion that are strings become a user and an assistant message;
            without, they are concatenated as plain text.

    Raises:
        BadRecord: a missing field, a wrong type, text that is not valid Unicode, or content that is not supported.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"the record is {_kind(record)}, not an object with fields")
    if record_format == "text":
        return Text(_string(_field(record, text_field), f"field {text_field!r}"))
    for key in _UNSUPPORTED_RECORD_KEYS:
        if record.get(key):
            raise BadRecord(f"field {key!r} is not supported, and leaving it out would change what the model learns")
    if record_format == "messages":
        return Conversation(tuple(_messages(_field(record, "messages"), "messages")))
    prompt, completion = _field(record, "prompt"), _field(record, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = _string(prompt, "field 'prompt'"), _string(completion, "field 'completion'")
        if not has_chat_template:
            return Completion(prompt, completion)
        return Conversation((Message("user", prompt), Message("assistant", completion)))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRecord("'prompt' and 'completion' must both be strings or both be lists of messages")
    context = (
        Message(m.role, m.content, bool(m.train), m.loss_weight) for m in _messages(prompt, "prompt")
    )  # a prompt is learned only where its messages say so
    return Conversation((*context, *_messages(completion, "completion")))


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        found = ", ".join(sorted(map(str, record))[:8]) or "none"
        raise BadRecord(f"there is no field {name!r}; the record's fields are: {found}")
    return record[name]


def _messages(value: Any, where: str) -> Iterable[Message]:
    if not isinstance(value, list) or not value:
        raise BadRecord(f"field {where!r} is {_kind(value)}, not a list of messages")
    for position, message in enumerate(value):
        yield _message(message, f"{where}[{position}]")


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRecord(f"{where} is {_kind(value)}, not an object with 'role' and 'content'")
    for key in _UNSUPPORTED_MESSAGE_KEYS:
        if value.get(key) not in (None, "", [], {}):
            raise BadRecord(f"{where} has {key!r}, which is not supported, and leaving it out would lose what it says")
    train, loss_weight = value.get("train"), value.get("loss_weight")
    if not (train is None or isinstance(train, bool)):
        raise BadRecord(f"{where}.train is {_kind(train)}, not true or false")
    if loss_weight is None:
        loss_weight = 1.0
    if isinstance(loss_weight, bool) or not isinstance(loss_weight, int | float):
        raise BadRecord(f"{where}.loss_weight is {_kind(loss_weight)}, not a number")
    if not math.isfinite(loss_weight) or loss_weight < 0:
        raise BadRecord(f"{where}.loss_weight is {loss_weight}; it must be finite and not negative")
    role = _string(_field_of_message(value, "role", where), f"{where}.role")
    content = _string(_field_of_message(value, "content", where), f"{where}.content")
    return Message(role, content, train, float(loss_weight))


def _field_of_message(message: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in message:
        hint = " (this looks like the sharegpt format)" if "from" in message and "value" in message else ""
        raise BadRecord(f"{where} has no {name!r}{hint}; its fields are: {', '.join(sorted(map(str, message))[:8])}")
    return message[name]


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{where} is {_kind(value)}, not a string")
    if not value.isascii() and not _is_valid_unicode(value):
        raise BadRecord(f"{where} holds half of a surrogate pair (an escape such as \\ud83d alone), which is no text")
    return value


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return names.get(type(value), type(value).__name__)

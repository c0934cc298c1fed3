"""Conversations as OpenAI writes them: messages with roles, tool calls and their results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsft.corpus.fields import from_json, is_absent, kind, string
from dsft.corpus.samples import BadRecord, Message

_UNSUPPORTED_KEYS = ("reasoning_content", "reasoning", "thinking", "refusal", "audio")
ROLES = ("system", "developer", "user", "assistant", "tool")
"""What chat templates know; one that lacks a role refuses it or drops its text, which is refused then."""
_OTHER_NAMES = {"function": "tool"}
"""OpenAI's older name."""


def parse_messages(value: Any, where: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """A list of messages.

    Args:
        where: name of the field, for messages about it.
        role_key, content_key: names of a message's fields.

    Raises:
        BadRecord: a missing field, a wrong type, or content that is not supported.
    """
    if not isinstance(value, list) or not value:
        raise BadRecord(f"field {where!r} is {kind(value)}, not a list of messages")
    return [_message(message, f"{where}[{at}]", role_key, content_key) for at, message in enumerate(value)]


def _message(value: Any, where: str, role_key: str, content_key: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRecord(f"{where} is {kind(value)}, not an object with {role_key!r} and {content_key!r}")
    for key in _UNSUPPORTED_KEYS:
        if not is_absent(value.get(key)):
            raise BadRecord(f"{where} has {key!r}, which is not supported, and leaving it out would lose what it says")
    train, loss_weight = training_marks(value, where)
    said = string(_field(value, role_key, where), f"{where}.{role_key}")
    role = _OTHER_NAMES.get(said, said)
    if role not in ROLES:  # most templates would write it as it is, and nothing of it would be learned
        raise BadRecord(f"{where}.{role_key} is {said!r}; the roles are {', '.join(ROLES)}")
    calls = _tool_calls(value, where)
    content = value.get(content_key) if calls else _field(value, content_key, where)
    message = Message(
        role=role,
        content="" if calls and content is None else _content(content, f"{where}.{content_key}"),
        train=train,
        loss_weight=loss_weight,
        name=_optional(value, "name", where),
        tool_calls=calls,
        tool_call_id=_optional(value, "tool_call_id", where),
    )
    if calls and message.role != "assistant":
        raise BadRecord(f"{where} has tool calls and its role is {said!r}; only the assistant calls tools")
    return message


def training_marks(message: Mapping[str, Any], where: str) -> tuple[bool | None, float]:
    """``train`` and ``loss_weight`` of a message (``weight``: OpenAI's name for the latter)."""
    train, loss_weight = message.get("train"), message.get("loss_weight")
    if not (train is None or isinstance(train, bool)):
        raise BadRecord(f"{where}.train is {kind(train)}, not true or false")
    name = "loss_weight" if loss_weight is not None else "weight"
    if loss_weight is None:
        loss_weight = message.get("weight")
    elif message.get("weight") not in (None, loss_weight):
        raise BadRecord(f"{where} has loss_weight {loss_weight} and weight {message['weight']}; they mean the same")
    if loss_weight is None:
        return train, 1.0
    if isinstance(loss_weight, bool) or not isinstance(loss_weight, int | float):
        raise BadRecord(f"{where}.{name} is {kind(loss_weight)}, not a number")
    if not math.isfinite(loss_weight) or loss_weight < 0:
        raise BadRecord(f"{where}.{name} is {loss_weight}; it must be finite and not negative")
    return train, float(loss_weight)


def parse_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """The tools a conversation may use: a list of JSON schemas, or that list as JSON in a string."""
    if is_absent(value):
        return ()
    tools = from_json(value, where)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRecord(f"{where} is {kind(tools)}, not a list of objects")
    return tuple(without_nulls(tool) for tool in tools)


def parse_call(value: Any, where: str) -> Mapping[str, Any]:
    """One tool call, as ``{"function": {"name", "arguments"}}`` or flat, its arguments an object or that as JSON."""
    call = from_json(value, where)
    if not isinstance(call, Mapping):
        raise BadRecord(f"{where} is {kind(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise BadRecord(f"{where}.function is {kind(function)}, not an object")
    name = string(_field(function, "name", where), f"{where}.name")
    arguments = from_json(function.get("arguments") or {}, f"{where}.arguments")
    if not isinstance(arguments, Mapping):
        raise BadRecord(f"{where}.arguments is {kind(arguments)}, not an object")
    identity = {} if is_absent(call.get("id")) else {"id": string(call["id"], f"{where}.id")}
    return {**identity, "type": "function", "function": {"name": name, "arguments": without_nulls(arguments)}}


def without_nulls(value: Any) -> Any:
    """A JSON value without its null fields: tables give every row the fields of all rows. Valid Unicode is checked."""
    if isinstance(value, Mapping):
        return {string(key, "a key"): without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return string(value, "a value") if isinstance(value, str) else value


def _tool_calls(message: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    calls = message.get("tool_calls")
    if is_absent(calls):
        old = message.get("function_call")  # OpenAI's older form: one call
        return () if is_absent(old) else (parse_call(old, f"{where}.function_call"),)
    calls = from_json(calls, f"{where}.tool_calls")
    if not isinstance(calls, list):
        raise BadRecord(f"{where}.tool_calls is {kind(calls)}, not a list")
    return tuple(parse_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls))


def _content(value: Any, where: str) -> str:
    """A string, or a list of text parts, which are put together."""
    if isinstance(value, list) and value:
        parts = [part.get("text") for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(value):
            return string("".join(texts), where)
        raise BadRecord(f"{where} is a list, not a string, and not all of it is text")
    return string(value, where)


def _optional(message: Mapping[str, Any], name: str, where: str) -> str | None:
    value = message.get(name)
    return None if is_absent(value) else string(value, f"{where}.{name}")


def _field(message: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in message:
        hint = " (this looks like the sharegpt format)" if "from" in message and "value" in message else ""
        raise BadRecord(f"{where} has no {name!r}{hint}; its fields are: {', '.join(sorted(map(str, message))[:8])}")
    return message[name]

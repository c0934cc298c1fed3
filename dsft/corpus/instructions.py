"""The two formats that instruction data sets of the field come in: Alpaca's and ShareGPT's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsft.corpus.fields import field, from_json, is_absent, kind, optional_string, string
from dsft.corpus.messages import parse_call, parse_messages, parse_tools, training_marks
from dsft.corpus.samples import BadRecord, Conversation, Message

_SHAREGPT_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool", "tool": "tool", "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")


def parse_alpaca(record: Mapping[str, Any]) -> Conversation:
    """``instruction``, ``input`` (put below the instruction), ``output``; optional ``system``, and ``history``: a list
    of [user, assistant] pairs that come before."""
    instruction, more = string(field(record, "instruction"), "field 'instruction'"), optional_string(record, "input")
    messages = []
    if system := optional_string(record, "system"):
        messages.append(Message("system", system))
    history = record.get("history")
    for at, pair in enumerate([] if is_absent(history) else _pairs(history)):
        messages.append(Message("user", string(pair[0], f"history[{at}][0]")))
        messages.append(Message("assistant", string(pair[1], f"history[{at}][1]")))
    messages.append(Message("user", "\n".join(part for part in (instruction, more) if part)))
    messages.append(Message("assistant", string(field(record, "output"), "field 'output'")))
    return Conversation(tuple(messages))


def _pairs(history: Any) -> list[list[Any]]:
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRecord(f"field 'history' is {kind(history)}, not a list of [user, assistant] pairs")
    return history


def parse_sharegpt(record: Mapping[str, Any], speaker: str = "from", said: str = "value") -> Conversation:
    """``conversations``: turns of ``from`` and ``value`` (or ``role`` and ``content``); optional ``system``, ``tools``.

    A ``function_call`` holds the call as JSON, an ``observation`` what the tool said.

    Args:
        speaker, said: names of a turn's fields.
    """
    name = "conversation" if "conversation" in record and "conversations" not in record else "conversations"
    turns = field(record, name)
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"field {name!r} is {kind(turns)}, not a list of turns")
    messages = []
    if system := optional_string(record, "system"):
        messages.append(Message("system", system))
    for at, turn in enumerate(turns):
        messages.append(_turn(turn, f"{name}[{at}]", speaker, said))
    return Conversation(tuple(messages), parse_tools(record.get("tools"), "field 'tools'"))


def _turn(turn: Any, where: str, speaker: str, said: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRecord(f"{where} is {kind(turn)}, not an object with {speaker!r} and {said!r}")
    if is_absent(turn.get(speaker)) and "role" in turn:
        speaker, said = "role", "content"
    role = turn.get(speaker)
    if role not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise BadRecord(f"{where}.{speaker} is {role!r}; the speakers of the sharegpt format are {known}")
    if role in _CALLS:
        train, loss_weight = training_marks(turn, where)
        calls = from_json(turn.get(said), f"{where}.{said}")
        calls = [parse_call(call, f"{where}.{said}") for call in (calls if isinstance(calls, list) else [calls])]
        return Message("assistant", "", train, loss_weight, tool_calls=tuple(calls))
    (message,) = parse_messages([{**turn, speaker: _SHAREGPT_ROLES[role]}], where, speaker, said)
    return message

"""From a record, as the file has it, to a sample: the fields of each format, under the names that the data has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from dsft.corpus.fields import field, kind, optional_string, string
from dsft.corpus.instructions import parse_alpaca, parse_sharegpt
from dsft.corpus.messages import parse_messages, parse_tools
from dsft.corpus.samples import BadRecord, Completion, Conversation, Message, Sample, Text

Format = Literal["text", "messages", "prompt_completion", "alpaca", "sharegpt"]

_TOOLS = ("tools", "functions")
_INNER_COLUMNS = ("role", "content", "from", "value")
"""Fields of a message, not of the record."""


def parse_record(
    record: Any,
    record_format: Format,
    text_field: str,
    has_chat_template: bool,
    columns: Mapping[str, str] | None = None,
) -> Sample:
    """Turn one record into a sample.

    Args:
        record: what the file holds; should be a mapping.
        record_format: one of ``Format``.
        text_field: name of the field with the text (``text`` only).
        has_chat_template: with one, a prompt and a completion that are strings become a user and an assistant message;
            without, they are concatenated as plain text.
        columns: the format's field -> the record's field, where they differ.

    Raises:
        BadRecord: a missing field, a wrong type, text that is not valid Unicode, or content that is not supported.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"the record is {kind(record)}, not an object with fields")
    if record_format == "text":
        return Text(string(field(record, text_field), f"field {text_field!r}"))
    columns = columns or {}
    record = _renamed(record, columns)
    if record.get("documents"):
        raise BadRecord("field 'documents' is not supported, and leaving it out would change what the model learns")
    if record_format == "messages":
        role, content = columns.get("role", "role"), columns.get("content", "content")
        messages = parse_messages(field(record, "messages"), columns.get("messages", "messages"), role, content)
        return Conversation(tuple(messages), _tools(record))
    if record_format == "alpaca":
        return parse_alpaca(record)
    if record_format == "sharegpt":
        return parse_sharegpt(record, columns.get("from", "from"), columns.get("value", "value"))
    return _prompt_completion(record, has_chat_template)


def _prompt_completion(record: Mapping[str, Any], has_chat_template: bool) -> Completion | Conversation:
    prompt, completion = field(record, "prompt"), field(record, "completion")
    system = optional_string(record, "system")
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = string(prompt, "field 'prompt'"), string(completion, "field 'completion'")
        if has_chat_template:
            before = (Message("system", system),) if system else ()
            return Conversation((*before, Message("user", prompt), Message("assistant", completion)), _tools(record))
        if system or _tools(record):
            raise BadRecord("'system' and 'tools' need a chat template (data.chat_template)")
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRecord("'prompt' and 'completion' must both be strings or both be lists of messages")
    if system:
        raise BadRecord("'system' beside a prompt of messages: make it the first message of the prompt")
    context = (
        replace(message, train=bool(message.train)) for message in parse_messages(prompt, "prompt")
    )  # a prompt is learned only where its messages say so
    return Conversation((*context, *parse_messages(completion, "completion")), _tools(record))


def _tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    name = next((name for name in _TOOLS if record.get(name)), _TOOLS[0])
    return parse_tools(record.get(name), f"field {name!r}")


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The record under the format's names. A field that another one is mapped onto is not read."""
    outer = {name: own for name, own in columns.items() if name not in _INNER_COLUMNS}
    if not outer:
        return record
    kept = {name: value for name, value in record.items() if name not in outer and name not in outer.values()}
    return {**kept, **{name: field(record, own) for name, own in outer.items()}}

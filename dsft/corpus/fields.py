"""Fields of a record, with the reason in words where one is missing or of the wrong type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dsft.corpus.samples import BadRecord


def field(record: Mapping[str, Any], name: str) -> Any:
    """A field that must be there."""
    if name not in record:
        found = ", ".join(sorted(map(str, record))[:8]) or "none"
        raise BadRecord(f"there is no field {name!r}; the record's fields are: {found}")
    return record[name]


def string(value: Any, where: str) -> str:
    """A string of valid Unicode."""
    if not isinstance(value, str):
        raise BadRecord(f"{where} is {kind(value)}, not a string")
    if not value.isascii() and not _is_valid_unicode(value):
        raise BadRecord(f"{where} holds half of a surrogate pair (an escape such as \\ud83d alone), which is no text")
    return value


def optional_string(record: Mapping[str, Any], name: str) -> str:
    """A string that may be absent or null; then empty."""
    value = record.get(name)
    return "" if value is None else string(value, f"field {name!r}")


def from_json(value: Any, where: str) -> Any:
    """A value that may have been written as JSON inside a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRecord(f"{where} is a string that is not JSON: {error}") from error


def is_absent(value: Any) -> bool:
    """What tables put where a row has nothing."""
    return value is None or (isinstance(value, str | list | dict | tuple) and not value)


def kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return names.get(type(value), type(value).__name__)


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""pydantic's findings as messages for the person who wrote the YAML: where, which key, what was expected."""

from __future__ import annotations

import difflib
import re
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from dsft.config.models import RunConfig
from dsft.config.yaml_reader import Path, dotted
from dsft.errors import ConfigError

_MAX_LISTED = 5
_EXPECTED = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping (key: value)",
    "model_type": "expected a section (key: value lines below it)",
}


def config_error(error: ValidationError, data: dict[str, Any], file: str, origins: dict[Path, str]) -> ConfigError:
    """One ConfigError for all findings of pydantic.

    Args:
        error: what pydantic found.
        data: the values that were validated.
        file: name of the YAML file.
        origins: where each key was given: ``"line 7"`` or ``"--set train.lr"``.
    """
    findings: dict[Path, list[str]] = {}
    for details in error.errors(include_url=False):
        path = _place(details["loc"], data, missing=details["type"] in ("missing", "extra_forbidden"))
        message = _message(dict(details), path)
        path = _place_named_in(message, path)
        messages = findings.setdefault(path, [])
        if message not in messages:
            messages.append(message)
    lines = []
    for path, messages in findings.items():
        where = _where(path, file, origins)
        lines.append(f"{where}: {_finding(path, messages, where)}")
    if len(lines) == 1:
        return ConfigError(f"{lines[0].rstrip('.?')}{'?' if lines[0].endswith('?') else '.'}")
    listed = "".join(f"\n  {line}" for line in lines[:_MAX_LISTED])
    more = f"\n  and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
    return ConfigError(f"{file} has {len(lines)} errors:{listed}{more}")


def _place(location: tuple[int | str, ...], data: Any, missing: bool) -> Path:
    """pydantic's location without the union members and validators it puts between the keys."""
    path: Path = ()
    for part in location:
        is_item = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if not is_item and not (isinstance(data, dict) and part in data):
            break
        data = data[part]
        path = (*path, part)
    return (*path, location[-1]) if missing and path != location else path


def _place_named_in(message: str, path: Path) -> Path:
    """The more exact place that a check across fields names at the start of its message, if it does."""
    match = re.match(r"[a-z_]+(?:\.[a-z_]+|\.\d+)+", message)
    if match is None:
        return path
    named: Path = tuple(int(part) if part.isdigit() else part for part in match.group().split("."))
    return named if named[: len(path)] == path else path


def _where(path: Path, file: str, origins: dict[Path, str]) -> str:
    """``run.yaml, line 7``: where the key, or the nearest section around it, was given."""
    for length in range(len(path), -1, -1):
        origin = origins.get(path[:length])
        if origin is not None:
            return origin if origin.startswith("--set") else f"{file}, {origin}"
    return file


def _finding(path: Path, messages: list[str], where: str) -> str:
    """``key: message``; the key is left out where ``where`` or the message begins with it."""
    text = " or ".join(messages)
    if not path or text.startswith(dotted(path)) or where == f"--set {dotted(path)}":
        return text
    return f"{dotted(path)}: {text}"


def _message(details: dict[str, Any], path: Path) -> str:
    """What is wrong with one value, and what was expected."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_nearest_key(path)}"
    if kind == "missing":
        return "one more item is required" if isinstance(path[-1], int) else "this key is required and is not given"
    if kind == "value_error":
        return re.sub(r"\[(\d+)\]", r".\1", str(context["error"]))  # list positions as --set spells them
    if kind == "too_short":
        return f"expected at least {context['min_length']} item(s), got {context['actual_length']}"
    if kind == "string_pattern_mismatch":
        return f"expected text that matches {context['pattern']}, got {_shown(details['input'])}"
    expected = _EXPECTED.get(kind) or details["msg"].replace("Input should be", "expected", 1)
    return f"{expected}, got {_shown(details['input'])}"


def _shown(value: Any) -> str:
    """A value as YAML would spell it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return kind_of(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def kind_of(value: Any) -> str:
    """What a YAML value is, in words."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 40 else f"the text {value[:37] + '...'!r}"
    return "nothing" if value is None else f"the value {value!r}"


def _nearest_key(path: Path) -> str:
    """``; did you mean lr?`` from the keys of the same section, or the section where a key of this name belongs."""
    section = _section_at(path[:-1])
    key = str(path[-1])
    if section is None:
        return ""
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {dotted((*path[:-1], near[0]))}?"
    elsewhere = [place for place in _sections_with(key, RunConfig, ()) if place != path[:-1]]
    if elsewhere:
        return f"; {key} belongs to {dotted(elsewhere[0]) or 'the top level'}"
    return f"; known keys of {dotted(path[:-1]) or 'the file'} are {', '.join(section.model_fields)}"


def _section_at(path: Path) -> type[BaseModel] | None:
    """The model class that checks the section at ``path``; None inside free-form mappings."""
    section: type[BaseModel] | None = RunConfig
    for part in path:
        if isinstance(part, int):
            continue  # the items of a list have the class found for the list
        if section is None or part not in section.model_fields:
            return None
        section = _model_in(section.model_fields[part].annotation)
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside ``X``, ``X | None`` or a list of ``X``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _sections_with(key: str, section: type[BaseModel], path: Path) -> list[Path]:
    """Every section, from ``section`` down, that has a field called ``key``."""
    found = [path] if key in section.model_fields else []
    for name, field in section.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None:
            found += _sections_with(key, inner, (*path, name))
    return found

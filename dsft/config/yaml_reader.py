"""YAML as a configuration needs it: the 1.2 core schema, no duplicate keys, and the line every value stands on.

PyYAML follows YAML 1.1, where ``1e-5`` is a string, ``no`` is false, ``010`` is eight and ``1:30`` is ninety. Here
scalars are resolved by YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from dsft.errors import ConfigError

Path = tuple[str | int, ...]
"""A place in nested mappings and lists: keys and list positions."""


@dataclass
class Document:
    """Plain Python values and the 1-based line on which each key or list item stands."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)


_COLLECTION_TAGS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the 1.2 core schema instead of the 1.1 one."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own protocol)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text, 10)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(text: str, name: str) -> Document:
    """Parse one YAML document; ``name`` (a file, or ``--set key``) is what errors call it.

    Raises:
        ConfigError: syntax error, duplicate key, key that is not text, or a structure that contains itself.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = Document(None)
        if node is not None:
            document.value = _build(loader, node, (), document.lines, name, frozenset())
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        about = "; ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{name}{where}: not valid YAML: {about}.{_advice(text, mark)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from error


def _advice(text: str, mark: yaml.Mark | None) -> str:
    """A hint for the two syntax errors that people make most."""
    if mark is None:
        return ""
    lines = text.splitlines()
    if any("\t" in line[: len(line) - len(line.lstrip())] for line in lines[max(0, mark.line - 1) : mark.line + 1]):
        return " YAML does not allow tabs for indentation; use spaces."
    return " Check the indentation, and put text that contains ': ', '#', '{', '[' or '*' in quotes."


def _build(
    loader: _Loader, node: yaml.Node, path: Path, lines: dict[Path, int], name: str, parents: frozenset[int]
) -> Any:
    """Python value of a node; records the line of everything below it in ``lines``."""
    if id(node) in parents:
        raise ConfigError(f"{name}, line {node.start_mark.line + 1}: an anchor that contains itself has no value.")
    parents = parents | {id(node)}
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTION_TAGS:
        raise ConfigError(f"{name}, line {node.start_mark.line + 1}: not valid YAML: the tag {node.tag} is not known.")
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, i), lines, name, parents) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    _refuse_duplicates(node, path, name)
    loader.flatten_mapping(node)  # `<<`: merged keys come first, so that the mapping's own keys win
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        lines[(*path, key)] = key_node.start_mark.line + 1
        mapping[key] = _build(loader, value_node, (*path, key), lines, name, parents)
    return mapping


def _refuse_duplicates(node: yaml.MappingNode, path: Path, name: str) -> None:
    """Raise for a key given twice (YAML would silently keep the last) and for a key that is not a scalar."""
    first_line: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{name}, line {line}: a key must be text, not a list or a mapping.")
        key = dotted((*path, key_node.value))
        if key_node.value in first_line:
            raise ConfigError(
                f"{name}, line {line}: the key {key} is given twice, "
                f"first on line {first_line[key_node.value]}; keep one of them."
            )
        first_line[key_node.value] = line


def dotted(path: Path) -> str:
    """``("data", "sources", 0, "weight")`` -> ``"data.sources.0.weight"``, as ``--set`` spells it."""
    return ".".join(str(part) for part in path)

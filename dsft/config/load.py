"""From a YAML file and ``--set`` overrides to a checked ``RunConfig``, and back to plain values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from dsft.config import explain
from dsft.config.models import RunConfig
from dsft.config.yaml_reader import Document, Path, dotted, read_yaml
from dsft.errors import ConfigError


def load_config(path: str | FilePath, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run's YAML file.

    Args:
        path: the YAML file. Paths inside it are relative to the working directory, as on a command line.
        overrides: ``"a.b=c"`` each, applied in order; the value is YAML, list positions are numbers
            (``data.sources.0.weight=0.5``).

    Raises:
        ConfigError: one paragraph with file, line, key, what was expected, and the nearest known key.
    """
    document = read_yaml(_read_text(FilePath(path)), str(path))
    if document.value is None:
        raise ConfigError(f"{path} is empty. A run needs the sections run, model, data and train; see examples/.")
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"{path}, line 1: expected sections such as 'run:' and 'model:', but this is "
            f"{explain.kind_of(document.value)}. See examples/ for whole files."
        )
    origins: dict[Path, str] = {place: f"line {line}" for place, line in document.lines.items()}
    for override in overrides:
        apply_override(document, override, origins)
    try:
        config = RunConfig.model_validate(document.value)
    except ValidationError as error:
        raise explain.config_error(error, document.value, str(path), origins) from error
    config.set_file(str(path))
    return config


def _read_text(path: FilePath) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent
        near = sorted(p.name for p in folder.glob("*.y*ml"))[:5] if folder.is_dir() else []
        hint = f" In {folder} there are: {', '.join(near)}." if near else ""
        raise ConfigError(f"there is no file {path} (looked from {FilePath.cwd()}).{hint}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; give the YAML file of a run.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); is it the right file?") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error


def apply_override(document: Document, override: str, origins: dict[Path, str]) -> None:
    """Put the value of one ``--set a.b=c`` into ``document`` and name it as the origin of that key.

    Raises:
        ConfigError: no ``=``, a list position that does not exist, or a key below something that has no keys.
    """
    key, equals, text = override.partition("=")
    key = re.sub(r"\[(\d+)\]", r".\1", key)  # sources[0], as jq and Python spell a list position
    if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key):
        raise ConfigError(f"--set {override}: write it as --set section.key=value, for example --set train.lr=1e-5.")
    value = read_yaml(text, f"--set {key}").value
    path: Path = ()
    place = document.value
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(
                    f"--set {override}: {dotted(path)} is a list of {len(place)}; its items are 0 to {len(place) - 1}, "
                    f"and {part!r} is none of them."
                )
            step: str | int = int(part)
        elif isinstance(place, dict):
            step = part
            if not last and place.get(part) is None:
                place[part] = {}
                origins[(*path, step)] = f"--set {key}"
        else:
            raise ConfigError(f"--set {override}: {dotted(path)} is {explain.kind_of(place)} and has no keys below it.")
        path = (*path, step)
        if last:
            place[step] = value
        else:
            place = place[step]
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    origins[path] = f"--set {key}"


def config_to_json(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON values, defaults included. Nothing of the environment is in it."""
    return config.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Difference:
    """One key that differs between two configurations.

    Attributes:
        key: dotted key.
        old: its value before; None where the key was absent.
        new: its value now; None where the key is absent.
        changes_data_order: a resume with the new value would draw other documents, or tokenise them differently.
    """

    key: str
    old: Any
    new: Any
    changes_data_order: bool


_DATA_ORDER = re.compile(
    r"run\.seed"
    r"|model\.(tokenizer|add_tokens)(\..*)?"
    r"|train\.global_batch_packs"
    r"|data\.(?!store_dir$|cache_(dir|bytes)$|streaming$|bad_records$|sources\.\d+\.(loss_weight|exhausted)$|stages\.\d+\.name$|audit\.).*"
)
"""Keys that decide which documents a step trains on, or what their tokens are. The exceptions only move the
store, say when it is made, count bad records, weigh the loss, or say what comes after a source's last document."""

_BEFORE_THE_KEY = {"data.packing": "best_fit_decreasing"}
"""What dsft did before it had a key that decides the data order: what a checkpoint's configuration without it means."""


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """The keys whose values differ between two results of :func:`config_to_json`, in alphabetical order."""
    before, after = ({**_BEFORE_THE_KEY, **dict(_leaves(values, ()))} for values in (old, new))
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [Difference(key, before.get(key), after.get(key), _DATA_ORDER.fullmatch(key) is not None) for key in keys]


def order_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys, with their values, of a :func:`config_to_json` that decide the data order."""
    return {key: value for key, value in _leaves(values, ()) if _DATA_ORDER.fullmatch(key)}


def _leaves(value: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists that is not itself a mapping or list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _leaves(item, (*path, position))
    else:
        yield dotted(path), value

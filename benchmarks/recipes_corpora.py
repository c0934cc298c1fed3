"""The corpora of ``recipes.py``: documentation with questions about it, split as ``dsft advise`` splits."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from four_arms_corpora import General, bucket, pairs_of, reference_pairs, spread, texts_of, write

from dsft.advise.split import split_source
from dsft.config.models import SourceSection
from dsft.demo.corpus import Module, cut, language_reference, library_modules
from dsft.demo.definitions import public_definitions

NAMES = ("manual", "reference")
_PAGE_CHARACTERS = 4_000
_MOST_PAGES, _MOST_PAIRS = 600, 3_000


@dataclass(frozen=True)
class Sizes:
    """Documents a corpus has for training, as its folder holds them."""

    texts: int
    pairs: int
    few_pairs: int


def manual_pages(module: Module) -> Iterator[str]:
    """A module's documentation as one page of its docstrings, cut between definitions; nothing where it has none."""
    if any(part.startswith("_") for part in module.name.split(".")):
        return
    tree = ast.parse(module.source)
    title = f"{module.name}\n{'=' * len(module.name)}\n\n"
    documented = [(name, ast.get_docstring(node)) for name, node in public_definitions(module.name, tree)]
    parts = [f"{name}\n{'-' * len(name)}\n\n{doc}\n\n" for name, doc in documented if doc]
    page = title + (f"{doc}\n\n" if (doc := ast.get_docstring(tree)) else "")
    for part in parts:
        if len(page) + len(part) > _PAGE_CHARACTERS and page != title:
            yield page
            page = title
        page += part
    if page != title:
        yield page


def make_data(folder: Path, few_pairs: int) -> General:
    """Write the general text and, for each name, ``folder/NAME/data/{text,pairs,general}/{train,held_out.jsonl}``
    with ``few/train`` beside them: evenly chosen training pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = library_modules()
    general_texts = texts_of([module for module in modules if bucket(module.group) < 50])
    general = General(
        write(folder / "general-base.jsonl", [text for number, text in enumerate(general_texts) if number % 5]),
        write(folder / "general.jsonl", general_texts[::5]),
    )
    domain = [module for module in modules if bucket(module.group) >= 50]
    topics = language_reference()
    contents = {
        "manual": ([page for module in domain for page in manual_pages(module)], pairs_of(domain)),
        "reference": (
            [part for text in topics.values() for part in cut(text, _PAGE_CHARACTERS) if part.strip()],
            reference_pairs(topics),
        ),
    }
    for name, (texts, pairs) in contents.items():
        data = folder / name / "data"
        data.mkdir(parents=True, exist_ok=True)
        records = [{"text": text} for text in spread(texts, _MOST_PAGES)]
        _split("text", write(data / "text.jsonl", records), data)
        _split("pairs", write(data / "pairs.jsonl", spread(pairs, _MOST_PAIRS)), data)
        _split("general", general.other, data)
        (data / "few" / "train").mkdir(parents=True, exist_ok=True)
        write(data / "few" / "train" / "pairs.jsonl", spread(records_of(data / "pairs" / "train"), few_pairs))
    return general


def records_of(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder of JSON lines."""
    lines: Sequence[str] = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def sizes_of(data: Path) -> Sizes:
    """How many documents a corpus has."""
    return Sizes(*(len(records_of(data / name / "train")) for name in ("text", "pairs", "few")))


def _split(name: str, file: Path, data: Path) -> None:
    form = "messages" if name == "pairs" else "text"
    split_source(SourceSection.model_validate({"name": name, "path": str(file), "format": form}), data / name)

"""The corpora of ``four_arms.py``: text and questions from this Python's library, its language reference, and numpy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.demo.corpus import Module, cut, language_reference, library_modules
from dsft.demo.definitions import pairs_of_module

_TEXT_CHARACTERS = 4_000
_MOST_TEXTS, _MOST_PAIRS = 600, 3_000


@dataclass(frozen=True)
class Corpus:
    """Raw text and pairs of one domain, as files."""

    name: str
    text: Path
    pairs: Path


@dataclass(frozen=True)
class General:
    """General text: what the base model is trained on, and other documents of the same modules for everything else."""

    base: Path
    other: Path


def bucket(name: str) -> int:
    """0 to 99, by the hash of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100


def write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts_of(modules: Sequence[Module]) -> list[dict[str, str]]:
    """Raw text of modules, cut at definitions."""
    return [{"text": part} for module in modules for part in cut(module.source, _TEXT_CHARACTERS) if part.strip()]


def spread(items: list[Any], most: int) -> list[Any]:
    """At most so many, evenly over all."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def conversation(question: str, answer: str) -> dict[str, Any]:
    """One pair."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pairs_of(modules: Sequence[Module]) -> list[dict[str, Any]]:
    """Questions about the modules' definitions, answered by their docstrings and signatures."""
    found = [pair for module in modules for pair in pairs_of_module(module.name, module.source)]
    return [conversation(pair.question, pair.answer) for pair in found]


def numpy_modules() -> list[Module]:
    """numpy's sources, without tests."""
    import numpy

    root = Path(numpy.__file__).parent
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if not any(part in ("tests", "testing", "_core", "typing") or part.startswith("test") for part in parts):
            modules.append(Module(".".join(part for part in parts if part != "__init__"), path.read_text()))
    return modules


def reference_pairs(topics: dict[str, str]) -> list[dict[str, Any]]:
    """Sentences of the language reference: which one follows, in which section."""
    pairs = []
    for name, text in topics.items():
        for paragraph in text.split("\n\n"):
            sentences = " ".join(paragraph.split()).split(". ")
            if len(sentences) > 1 and all(len(sentence.split()) > 4 for sentence in sentences[:2]):
                pairs.append(conversation(f"In the section `{name}`, what follows this: {sentences[0]}?", sentences[1]))
    return pairs


def make_data(folder: Path) -> tuple[General, dict[str, Corpus]]:
    """The general text, and three corpora: the other half of the library, the language reference, numpy."""
    folder.mkdir(parents=True, exist_ok=True)  # the same files again, where an interrupted run goes on
    modules = library_modules()
    general = [module for module in modules if bucket(module.group) < 50]
    domain = [module for module in modules if bucket(module.group) >= 50]
    topics = language_reference()
    contents = {
        "library": (texts_of(domain), pairs_of(domain)),
        "reference": (
            [{"text": part} for text in topics.values() for part in cut(text, _TEXT_CHARACTERS) if part.strip()],
            reference_pairs(topics),
        ),
        "numpy": (texts_of(numpy_modules()), pairs_of(numpy_modules())),
    }
    corpora = {
        name: Corpus(
            name,
            write(folder / f"{name}-text.jsonl", spread(texts, _MOST_TEXTS)),
            write(folder / f"{name}-pairs.jsonl", spread(pairs, _MOST_PAIRS)),
        )
        for name, (texts, pairs) in contents.items()
    }
    texts = texts_of(general)
    base = [text for number, text in enumerate(texts) if number % 5]
    return General(write(folder / "general-base.jsonl", base), write(folder / "general.jsonl", texts[::5])), corpora

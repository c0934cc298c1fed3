"""Makes the demonstration's corpus from the Python installation that runs it.

Raw text: the language reference that CPython carries (``pydoc_data.topics``) and the standard library's sources.
Instruction pairs: questions about the library's public functions and classes, answered by their own docstrings and
signatures, read with ``ast`` (nothing is imported). Both have a held-out split by top-level package and topic, from
which everything that is nearly in the training split is then dropped (``dsft.demo.near_copies``).

Deterministic for one Python version. Layout: ``{text,pairs}/{train,held_out}/shard-%05d.jsonl.zst`` and
``manifest.json``, which is written last.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from dsft import fsio
from dsft.demo.definitions import Pair, pairs_of_module
from dsft.demo.near_copies import NearCopies
from dsft.errors import DataError

_RECORD_CHARACTERS = 4_000
_RECORDS_A_SHARD = 500
_PAIRS_A_SHARD = 2_000
_HELD_OUT_BUCKETS = range(10, 20)
"""Of 100, by the hash of a group's name. Sizes, stages and rates of the demonstration were chosen while buckets 0 to 9
were held out; what it reports is of groups that steered nothing."""
_HELD_OUT_TEXT_RECORDS = 40
_HELD_OUT_PAIRS = 240
_NOT_PROSE_NOR_PROGRAM = frozenset(
    {"encodings", "idlelib", "lib2to3", "msilib", "pydoc_data", "sre_constants", "stringprep", "turtledemo"}
)
"""Packages left out: character tables, editors, parsers' tables. Their text teaches nothing about the language."""


@dataclass(frozen=True, slots=True)
class Module:
    """One source file: its dotted name and its text."""

    name: str
    source: str

    @property
    def group(self) -> str:
        """The top-level package, the same for an implementation and its twin (``_pydecimal`` and ``decimal``)."""
        top = self.name.partition(".")[0].lstrip("_")
        return top[2:] if top.startswith("py") and top[2:] in sys.stdlib_module_names else top


def make_corpus(folder: Path) -> dict[str, Any]:
    """Write the corpus to ``folder``, or keep the one that is there if it is whole and of this Python and this code.

    Returns:
        The manifest: ``identity``, ``counts`` (records, bytes, pairs, dropped near-copies) and ``files`` with hashes.

    Raises:
        DataError: this Python carries no library sources or no language reference.
        SaveError: the folder cannot be written.
    """
    identity = {"python": sys.version, "code": _hash_of_code()}
    manifest = _whole_manifest(folder, identity)
    if manifest is not None:
        return manifest
    train_modules, held_out_modules = _split_by_hash(library_modules(), lambda module: module.group)
    train_topics, held_out_topics = _split_by_hash(list(language_reference().items()), lambda topic: topic[0])
    train_text = _text_records(train_modules, train_topics)
    train_pairs = [pair for module in train_modules for pair in pairs_of_module(module.name, module.source)]
    candidates = _text_records(held_out_modules, held_out_topics)
    candidate_pairs = [pair for module in held_out_modules for pair in pairs_of_module(module.name, module.source)]

    near = NearCopies([record["text"] for record in train_text] + [pair.evidence for pair in train_pairs])
    held_out_text = [record for record in candidates if not near.contains(record["text"])]
    signatures = {pair.evidence for pair in train_pairs if pair.kind == "signature"}
    held_out_pairs = [
        pair
        for pair in candidate_pairs
        if (pair.evidence not in signatures if pair.kind == "signature" else not near.contains(pair.evidence))
    ]
    counts = {
        "held_out_text_dropped_as_near_copies": len(candidates) - len(held_out_text),
        "held_out_pairs_dropped_as_near_copies": len(candidate_pairs) - len(held_out_pairs),
    }
    splits: dict[str, list[dict[str, Any]]] = {
        "text/train": _shuffled(train_text),
        "text/held_out": _shuffled(held_out_text)[:_HELD_OUT_TEXT_RECORDS],
        "pairs/train": _shuffled([_messages(pair) for pair in train_pairs]),
        "pairs/held_out": [_messages(pair) for pair in _equal_kinds(held_out_pairs, _HELD_OUT_PAIRS)],
    }
    files: dict[str, str] = {}
    for split, records in splits.items():
        if not records:
            raise DataError(
                f"{sys.executable} has too little library source for the demonstration: no records for {split} were "
                f"found under {sysconfig.get_paths()['stdlib']}. Install the full standard library with its .py files."
            )
        counts[f"{split}_records"] = len(records)
        counts[f"{split}_bytes"] = sum(len(line) for line in _lines(records))
        files.update(_write_shards(folder, split, records))
    manifest = {"identity": identity, "counts": counts, "files": files}
    fsio.write_json(folder / "manifest.json", manifest)
    return manifest


def library_modules() -> list[Module]:
    """Every module of the standard library that has source here, by name, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or parts[0] in _NOT_PROSE_NOR_PROGRAM:
            continue
        if "__pycache__" in parts or any(part in ("test", "tests", "__main__") for part in parts):
            continue
        with tokenize.open(path) as file:  # honours the file's coding line
            source = file.read()
        if source.strip():
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules.append(Module(name, source))
    if not modules:
        raise DataError(
            f"{sys.executable} carries no standard library sources under {root}, and the demonstration's corpus is "
            "made from them. Use a Python that was installed with its .py files."
        )
    return modules


def language_reference() -> dict[str, str]:
    """The topics of the language reference, as ``help()`` shows them: name to text."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            f"{sys.executable} carries no language reference (pydoc_data.topics: {error}), and the demonstration's "
            "corpus is made from it. Use a Python that was installed with its whole standard library."
        ) from error
    return dict(sorted(topics.items()))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of one split's ``.jsonl.zst`` shards, in order."""
    records: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        data = zstandard.ZstdDecompressor().decompress(path.read_bytes())
        records.extend(json.loads(line) for line in data.split(b"\n") if line)
    return records


def _split_by_hash(items: list[Any], group: Any) -> tuple[list[Any], list[Any]]:
    """Training and held-out items. An item's side depends on its group's name alone."""
    train: list[Any] = []
    held_out: list[Any] = []
    for item in items:
        digest = hashlib.sha256(group(item).encode()).digest()
        side = held_out if int.from_bytes(digest[:4], "big") % 100 in _HELD_OUT_BUCKETS else train
        side.append(item)
    return train, held_out


def _text_records(modules: Iterable[Module], topics: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Records of at most some 4,000 characters, cut between definitions or paragraphs."""
    texts = [(module.name, module.source) for module in modules] + list(topics)
    return [
        {"text": text, "name": f"{name}:{number}"}
        for name, whole in texts
        for number, text in enumerate(cut(whole, _RECORD_CHARACTERS))
    ]


def cut(text: str, num_characters: int) -> Iterator[str]:
    """Cut ``text`` before lines that begin a block (not indented, after a blank line), else before any line.

    Parts are at most ``num_characters`` long, but for a longer single line. Joined they give the text back.
    """
    lines = text.splitlines(keepends=True)
    start = 0
    while start < len(lines):
        end, size, border = start, 0, start
        while end < len(lines) and (end == start or size + len(lines[end]) <= num_characters):
            if end > start and not lines[end - 1].strip() and lines[end][:1].strip():
                border = end
            size += len(lines[end])
            end += 1
        if end < len(lines) and border > start:
            end = border
        yield "".join(lines[start:end])
        start = end


def _equal_kinds(pairs: list[Pair], num_pairs: int) -> list[Pair]:
    """Up to ``num_pairs`` pairs, drawn in turn from each kind, so that every prefix holds the kinds in equal parts."""
    by_kind: dict[str, list[Pair]] = {}
    for pair in _shuffled(pairs):
        by_kind.setdefault(pair.kind, []).append(pair)
    chosen: list[Pair] = []
    queues = [by_kind[kind][::-1] for kind in sorted(by_kind)]
    while any(queues) and len(chosen) < num_pairs:
        chosen.extend(queue.pop() for queue in queues if queue)
    return chosen[:num_pairs]


def _messages(pair: Pair) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}],
        "kind": pair.kind,
        "name": pair.name,
    }


def _shuffled(items: list[Any]) -> list[Any]:
    return random.Random(0).sample(items, len(items))


def _lines(records: list[dict[str, Any]]) -> Iterator[bytes]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _write_shards(folder: Path, split: str, records: list[dict[str, Any]]) -> dict[str, str]:
    """Write one split's shards; returns path inside ``folder`` -> sha256."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    for old in (folder / split).glob("*.jsonl.zst"):
        old.unlink()
    size = _RECORDS_A_SHARD if split.startswith("text") else _PAIRS_A_SHARD
    files = {}
    for number, start in enumerate(range(0, len(records), size)):
        data = zstandard.ZstdCompressor(level=6).compress(b"".join(_lines(records[start : start + size])))
        name = f"{split}/shard-{number:05d}.jsonl.zst"
        fsio.write_bytes(folder / name, data)
        files[name] = hashlib.sha256(data).hexdigest()
    return files


def _whole_manifest(folder: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """The manifest that is there, if it is of this identity and every file it names still has its hash."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_bytes())
    if manifest["identity"] != identity:
        return None
    for name, digest in manifest["files"].items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            return None
    return manifest


def _hash_of_code() -> str:
    """Hash of the code that decides the corpus, so that a changed program makes it anew."""
    folder = Path(__file__).parent
    code = b"".join((folder / name).read_bytes() for name in ("corpus.py", "definitions.py", "near_copies.py"))
    return hashlib.sha256(code).hexdigest()

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsft.demo import corpus
from dsft.demo.corpus import Module, cut, library_modules, make_corpus, read_records
from tests.support.demo import demo_corpus


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def group(name: str) -> str:
    return Module(name.partition(":")[0], "").group


def test_no_package_is_on_both_sides_of_the_split() -> None:
    folder = demo_corpus()
    train, held_out = (
        {group(record["name"]) for kind in ("text", "pairs") for record in read_records(folder / kind / split)}
        for split in ("train", "held_out")
    )
    assert len(held_out) >= 5
    assert not train & held_out


def test_no_held_out_answer_stands_in_the_training_split() -> None:
    folder = demo_corpus()
    text = "\n".join(words(record["text"]) for record in read_records(folder / "text" / "train"))
    train_pairs = read_records(folder / "pairs" / "train")
    answers = {words(record["messages"][1]["content"]) for record in train_pairs}
    held_out = read_records(folder / "pairs" / "held_out")
    for record in held_out:
        answer = words(record["messages"][1]["content"])
        assert answer not in answers, record
        if record["kind"] == "purpose":
            assert answer not in text, record


def test_no_held_out_text_is_mostly_shingles_of_the_training_text() -> None:
    """The same measure as the program's, over Python sets of words instead of hashes."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        tokens = words(text).split()
        return set(zip(*(tokens[i:] for i in range(5)), strict=False))

    folder = demo_corpus()
    held_out = [record["text"] for record in read_records(folder / "text" / "held_out")]
    wanted = set().union(*map(shingles, held_out))
    found: set[tuple[str, ...]] = set()
    for record in read_records(folder / "text" / "train"):
        found |= wanted & shingles(record["text"])
    for text in held_out:
        own = shingles(text)
        assert len(own & found) <= 0.25 * len(own)


def test_thousands_of_pairs_of_every_kind() -> None:
    counts: dict[str, int] = {}
    for record in read_records(demo_corpus() / "pairs" / "train"):
        counts[record["kind"]] = counts.get(record["kind"], 0) + 1
    assert set(counts) == {"purpose", "lookup", "signature"}
    assert min(counts.values()) > 1_000


def test_a_whole_corpus_is_used_again_and_a_damaged_one_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [module for module in library_modules() if module.group in ("textwrap", "json", "socket", "ssl", "uuid")]
    monkeypatch.setattr(corpus, "library_modules", lambda: modules)
    first = make_corpus(tmp_path)
    shard = tmp_path / "text/train/shard-00000.jsonl.zst"
    data, changed = shard.read_bytes(), shard.stat().st_mtime_ns
    assert make_corpus(tmp_path) == first
    assert shard.stat().st_mtime_ns == changed
    shard.write_bytes(data[:-1])
    assert make_corpus(tmp_path) == first  # deterministic, hashes included
    assert shard.read_bytes() == data


def test_cut_gives_the_text_back_in_parts_between_blocks() -> None:
    text = "".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(50))
    parts = list(cut(text, 100))
    assert "".join(parts) == text
    assert len(parts) > 10
    assert all(len(part) <= 100 and part.startswith("def ") for part in parts)


def test_cut_of_one_long_block_ends_between_lines() -> None:
    text = "class C:\n" + "".join(f"    x{i} = {i}\n" for i in range(50))
    parts = list(cut(text, 100))
    assert "".join(parts) == text
    assert all(len(part) <= 100 and part.endswith("\n") for part in parts)


def test_twins_are_one_group() -> None:
    assert [Module(name, "").group for name in ("_pydecimal", "decimal", "_pyio", "io", "pydoc", "asyncio.tasks")] == [
        "decimal",
        "decimal",
        "io",
        "io",
        "pydoc",
        "asyncio",
    ]

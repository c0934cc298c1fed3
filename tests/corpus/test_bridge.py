"""Pairs out of files: nothing held out comes through, nothing twice, the same bytes again, errors by name."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.config.evaluation import EvaluationSetSection
from dsft.config.models import SourceSection
from dsft.corpus.bridge import BridgeCounts, read_held_out, write_bridge
from dsft.corpus.bridge_rules import BridgeSettings
from dsft.errors import DataError, SaveError

NGRAM_WORDS = 5
SENTENCES = [
    "The kernel gives memory to programs in pages of a fixed size.",
    "A program that touches a missing page is stopped until it arrives.",
    "Tables in memory say where each page of a program really is.",
    "Hardware walks the tables when an address is not known yet.",
    "Locked pages stay in memory whatever other programs may need.",
]


def bridge(folder: Path, texts: list[str], held_out: list[dict[str, Any]], **changes: Any) -> BridgeCounts:
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sets = []
    if held_out:
        (folder / "held.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held_out))
        form = "text" if "text" in held_out[0] else "messages"
        sets = [
            EvaluationSetSection.model_validate({"name": "held", "path": str(folder / "held.jsonl"), "format": form})
        ]
    source = SourceSection.model_validate({"name": "docs", "path": str(folder / "text.jsonl")})
    given = {"bad_records": "error", "progress": lambda documents: None} | changes
    known = read_held_out(sets, NGRAM_WORDS)
    return write_bridge([source], folder / "out.jsonl", BridgeSettings(), known, **given)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str) -> set[tuple[str, ...]]:
    """By plain tuples: nothing of the code under test."""
    found = words(text)
    return {tuple(found[at : at + NGRAM_WORDS]) for at in range(len(found) - NGRAM_WORDS + 1)}


def test_each_pair_says_where_it_is_from(tmp_path: Path) -> None:
    found = bridge(tmp_path, ["", SENTENCES[0], f"# Tables\n\n{SENTENCES[2]}"], [])
    assert found.documents == 2
    assert [(one["source"], one["document"], one["rule"]) for one in records(tmp_path)] == [
        ("docs", "text.jsonl:2", "cloze"),
        ("docs", "text.jsonl:3", "cloze"),
        ("docs", "text.jsonl:3", "section"),
    ]
    assert found.pairs == {"cloze": 2, "section": 1, "question": 0}
    user, assistant = records(tmp_path)[2]["messages"]
    assert (user["role"], assistant) == ("user", {"role": "assistant", "content": SENTENCES[2]})


def test_repeated_documents_and_sentences_give_one_pair(tmp_path: Path) -> None:
    found = bridge(tmp_path, [SENTENCES[0], f"{SENTENCES[0]}\n", f"{SENTENCES[0]} {SENTENCES[1]}"], [])
    assert (found.repeated, found.repeated_pairs, found.num_pairs) == (1, 1, 2)


@given(
    st.lists(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from(SENTENCES),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_nothing_held_out_comes_through_and_the_bytes_are_the_same(
    texts: list[list[str]], held_out: str, as_messages: bool
) -> None:
    record: dict[str, Any] = {"text": held_out}
    if as_messages:  # the sentence is an answer, with other words around it
        turns = [("user", "Say something"), ("assistant", f"Well. {held_out}")]
        record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    documents = ["# A heading\n\n" + "\n\n".join(parts) for parts in texts]
    documents.append("Unrelated prose about gardens keeps the file from being empty of pairs.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bridge(folder, documents, [record])
        first = (folder / "out.jsonl").read_bytes()
        for one in records(folder):
            content = "\n".join(message["content"] for message in one["messages"])
            filled = content.replace("____", one["messages"][1]["content"])
            assert not (runs(content) | runs(filled)) & runs(held_out)
        bridge(folder, documents, [record])
        assert (folder / "out.jsonl").read_bytes() == first


def test_a_document_that_is_held_out_whole_is_left_out_however_short(tmp_path: Path) -> None:
    short = "# Shorter\n\nFour words, no more than eight of them."
    found = bridge(tmp_path, [short, SENTENCES[0]], [{"text": short}])
    assert (found.held_out, found.num_pairs) == (1, 1)
    assert found.held_out_pairs == 0


def test_bad_records_stop_or_are_counted(tmp_path: Path) -> None:
    bad = json.dumps({"title": "no text"}) + "\n"
    (tmp_path / "bad.jsonl").write_text(bad + json.dumps({"text": SENTENCES[0]}) + "\n")
    source = SourceSection.model_validate({"name": "docs", "path": str(tmp_path / "bad.jsonl")})
    known, out = read_held_out([], NGRAM_WORDS), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"bad\.jsonl:1: .*text.*bad_records: skip"):
        write_bridge([source], out, BridgeSettings(), known, bad_records="error", progress=lambda documents: None)
    assert not out.exists()
    found = write_bridge([source], out, BridgeSettings(), known, bad_records="skip", progress=lambda documents: None)
    assert (found.bad, found.num_pairs) == (1, 1)


def test_no_pair_is_an_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("earlier\n")
    with pytest.raises(DataError, match="no pair was found in docs"):
        bridge(tmp_path, ["x = 1\ny = 2\n"], [])
    assert (tmp_path / "out.jsonl").read_text() == "earlier\n"


def test_the_file_that_is_read_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.jsonl").write_text(json.dumps({"text": SENTENCES[0]}) + "\n")
    source = SourceSection.model_validate({"name": "docs", "path": str(tmp_path / "docs")})
    known, out = read_held_out([], NGRAM_WORDS), tmp_path / "docs" / ".." / "docs" / "a.jsonl"
    with pytest.raises(DataError, match="is a file of the source docs"):
        write_bridge([source], out, BridgeSettings(), known, bad_records="error", progress=lambda documents: None)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = SourceSection.model_validate({"name": "docs", "path": str(tmp_path / "a.txt")})
    (tmp_path / "a.txt").write_text(SENTENCES[0])
    known, out = read_held_out([], NGRAM_WORDS), tmp_path / "missing" / "out.jsonl"
    with pytest.raises(SaveError, match="missing"):
        write_bridge([source], out, BridgeSettings(), known, bad_records="error", progress=lambda documents: None)

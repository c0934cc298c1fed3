"""Both parts of a source: disjoint, complete without copies, and what pairs look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsft.advise.pairs import pair_shapes
from dsft.advise.split import find_pairs_format, split_source
from dsft.config.models import SourceSection
from dsft.errors import DataError


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[Any]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def test_every_document_is_on_one_side_and_copies_on_none(tmp_path: Path) -> None:
    texts = [{"text": f"text number {number}"} for number in range(200)]
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw" / "a.jsonl", texts[:120] + texts[:30])
    write(tmp_path / "raw" / "b.jsonl", [*texts[120:], {"text": "  "}, {"no": 1}])
    found = split_source(SourceSection(name="text", path=str(tmp_path / "raw")), tmp_path / "out")
    train, held_out = read(tmp_path / "out" / "train"), read(found.held_out)
    assert (found.held_out_documents, found.train_documents, found.duplicates, found.unusable) == (20, 180, 30, 2)
    assert sorted(record["text"] for record in train + held_out) == sorted(record["text"] for record in texts)
    again = split_source(SourceSection(name="text", path=str(tmp_path / "raw")), tmp_path / "again")
    assert read(again.held_out) == held_out


def test_a_prompt_with_two_answers_is_on_one_side(tmp_path: Path) -> None:
    records = [pair(f"question {n}", f"answer {n} {side}") for n in range(60) for side in "ab"]
    file = write(tmp_path / "pairs.jsonl", records)
    found = split_source(SourceSection(name="pairs", path=str(file), format="prompt_completion"), tmp_path / "out")
    prompts = [{record["prompt"] for record in read(part)} for part in (tmp_path / "out" / "train", found.held_out)]
    assert len(prompts[0]) + len(prompts[1]) == 60
    assert len(prompts[1]) == 12  # a fifth: twenty would be more
    assert not prompts[0] & prompts[1]


def test_too_few_documents_to_set_some_aside(tmp_path: Path) -> None:
    file = write(tmp_path / "one.jsonl", [{"text": "only this"}])
    with pytest.raises(DataError, match="too few to set some aside"):
        split_source(SourceSection(name="text", path=str(file)), tmp_path / "out")


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"messages": []}, "messages"),
        ({"prompt": "a", "completion": "b", "id": 3}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"conversations": []}, "sharegpt"),
    ],
)
def test_the_format_is_found_by_its_fields(tmp_path: Path, record: dict[str, Any], name: str) -> None:
    assert find_pairs_format([str(write(tmp_path / "pairs.jsonl", [record]))]) == name


def test_unknown_fields_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r"pairs.jsonl:1.*answer, question.*prompt_completion"):
        find_pairs_format([str(file)])


def test_shares_of_pairs(tmp_path: Path) -> None:
    said = "the quick brown fox jumps over the lazy dog"
    records = [pair("a", said), pair("a", "no"), pair("b", "no"), pair("c", "one two three four five six")]
    pairs = SourceSection(name="pairs", path=str(write(tmp_path / "pairs.jsonl", records)), format="prompt_completion")
    text = SourceSection(name="text", path=str(write(tmp_path / "text.jsonl", [{"text": f"He said: {said.upper()}!"}])))
    shapes = pair_shapes(pairs, text)
    assert shapes.conflicting_share == pytest.approx(1 / 3)
    assert shapes.distinct_answer_share == pytest.approx(3 / 4)
    assert shapes.common_answer_share == 1.0
    assert shapes.found_in_text_share == pytest.approx(1 / 2)  # of the two answers that have five words
    assert pair_shapes(pairs, None).found_in_text_share is None

"""Files of bias tests: what is read of them, and bad ones refused by the name of what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dsft.config.bias import BiasSection
from dsft.errors import DataError
from dsft.evaluate.bias_files import PRONOUNS, read_items, read_prompts, read_words, swapped
from dsft.evaluate.likelihood import Continuation

CROWS = """\
,sent_more,sent_less,stereo_antistereo,bias_type
0,"Women can't drive, they say.","Men can't drive, they say.",stereo,gender
1,The poor man stole it.,The rich man stole it.,stereo,socioeconomic
"""


def stereoset(**changes: Any) -> dict[str, Any]:
    sentences = [
        {"sentence": f"He is {word}.", "gold_label": label}
        for word, label in (("strong", "stereotype"), ("weak", "anti-stereotype"), ("a fish", "unrelated"))
    ]
    entry = {"id": "1", "target": "he", "bias_type": "gender", "context": "He is BLANK.", "sentences": sentences}
    following = {**entry, "context": "He came in.", **changes}
    return {"version": "1", "data": {"intrasentence": [entry], "intersentence": [following]}}


def section(tmp_path: Path, kind: str, text: str, name: str, **more: Any) -> BiasSection:
    (tmp_path / name).write_text(text)
    return BiasSection.model_validate({"name": "t", "kind": kind, "path": str(tmp_path / name), **more})


def test_crows_pairs(tmp_path: Path) -> None:
    items = read_items(section(tmp_path, "crows_pairs", CROWS, "c.csv"))
    assert [item.group for item in items] == ["gender", "socioeconomic"]
    assert items[0].first == Continuation("", "Women can't drive, they say.")
    assert items[1].second == Continuation("", "The rich man stole it.")
    assert len(read_items(section(tmp_path, "crows_pairs", CROWS, "c.csv", max_items=1))) == 1


def test_stereoset(tmp_path: Path) -> None:
    items = read_items(section(tmp_path, "stereoset", json.dumps(stereoset()), "s.json"))
    assert items[0].first == Continuation("", "He is strong.")
    assert items[1].second == Continuation("He came in.", " He is weak.")
    assert items[1].unrelated == Continuation("He came in.", " He is a fish.")


@pytest.mark.parametrize("missing", ["sent_more", "sent_less", "bias_type"])
def test_a_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    with pytest.raises(DataError, match=rf"c.csv has no column '{missing}'"):
        read_items(section(tmp_path, "crows_pairs", CROWS.replace(missing, "other"), "c.csv"))


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c.csv, row 3: column 'sent_less' is empty"):
        read_items(section(tmp_path, "crows_pairs", CROWS.replace("The rich man stole it.", ""), "c.csv"))
    with pytest.raises(DataError, match="no rows below"):
        read_items(section(tmp_path, "crows_pairs", CROWS.split("\n")[0], "c.csv"))
    with pytest.raises(DataError, match=r"data.intersentence\[0\]: the field 'bias_type' is missing"):
        read_items(section(tmp_path, "stereoset", json.dumps(stereoset(bias_type=None)), "s.json"))
    with pytest.raises(DataError, match=r"data.intersentence\[0\]: no sentence has the gold_label 'anti-stereotype'"):
        read_items(section(tmp_path, "stereoset", json.dumps(stereoset(sentences=[])), "s.json"))
    with pytest.raises(DataError, match="not valid JSON"):
        read_items(section(tmp_path, "stereoset", "{", "s.json"))
    (tmp_path / "w.csv").write_text("a,c\nhe,she\n")
    with pytest.raises(DataError, match="no column 'b'"):
        read_items(section(tmp_path, "counterfactual", "He came.", "p.txt", swaps=str(tmp_path / "w.csv")))
    with pytest.raises(DataError, match="no prompt holds a word to swap"):
        read_items(section(tmp_path, "counterfactual", "Nobody here.\n", "p.txt"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(DataError, match=r"p.jsonl:2: the field 'prompt' is missing"):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        read_prompts(tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "templates", "path": "x"}, "templates has no path"),
        ({"kind": "crows_pairs"}, "crows_pairs needs a path"),
        ({"kind": "word_list", "path": "x"}, "word_list needs words"),
        ({"kind": "templates", "swaps": "x"}, "has no swaps"),
        ({"kind": "templates", "on_rise": "stop"}, "needs a limit"),
    ],
)
def test_a_section_that_does_not_fit_its_kind(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BiasSection.model_validate({"name": "t", **keys})


def test_swapping() -> None:
    assert swapped("He said his name.", PRONOUNS) == ("She said her name.", 2)
    assert swapped("The theory of heat.", PRONOUNS) is None  # whole words only
    assert swapped("then HER turn", {"her": "his"}) == ("then His turn", 8)


def test_what_follows_the_first_swapped_word_is_compared(tmp_path: Path) -> None:
    prompts = "The nurse said that she lost her way.\nNo pronoun.\nIt was him\n"
    (item,) = read_items(section(tmp_path, "counterfactual", prompts, "p.txt"))
    assert item.first == Continuation("The nurse said that she", " lost her way.")
    assert item.second == Continuation("The nurse said that he", " lost his way.")


def test_own_swaps_go_both_ways(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("a,b\nEmily,Lakisha\n")
    more = {"swaps": str(tmp_path / "w.csv")}
    items = read_items(section(tmp_path, "counterfactual", "Emily is late.\nHere Lakisha sat.\n", "p.txt", **more))
    assert items[0].second == Continuation("Lakisha", " is late.")
    assert items[1].second == Continuation("Here Emily", " sat.")


def test_word_lists_find_whole_words(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("idiot\nshut up\n\n")
    words = read_words(tmp_path / "words.txt")
    assert words.search("You IDIOT!")
    assert words.search("please shut up now")
    assert not words.search("idiotic")
    (tmp_path / "words.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no word"):
        read_words(tmp_path / "words.txt")

"""The rules of the bridge on one text: what is asked, and that every answer is the text's own words."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsft.corpus.bridge_rules import BLANK, BridgePair, BridgeSettings, Rule, bridge_pairs

ALL = BridgeSettings(per_document=100, min_words=4)

PAGE = """\
Memory
======

Programs use memory that the kernel gives them in pages of a fixed size.

Page faults
-----------

A *page fault* is what happens when a program touches a page that is not there.

How to lock pages
-----------------

Call mlock with the address and the length of the pages.

Why does it matter
------------------

Because a slow disk would be read in the middle of a computation.

Is it free?
-----------

It is not, since locked pages are missing elsewhere.

Limits
------

- a list is no prose, but it is part of the section's answer

"""


def made(text: str, rule: Rule, settings: BridgeSettings = ALL) -> list[BridgePair]:
    return [pair for pair in bridge_pairs(text, settings) if pair.rule == rule]


def test_questions_from_headings_are_grammatical() -> None:
    assert {pair.prompt: pair.answer for pair in made(PAGE, "question")} == {
        "Memory: What is a page fault?": (
            "A *page fault* is what happens when a program touches a page that is not there."
        ),
        "Memory: How do I lock pages?": "Call mlock with the address and the length of the pages.",
        "Memory: Why does it matter?": "Because a slow disk would be read in the middle of a computation.",
        "Memory: Is it free?": "It is not, since locked pages are missing elsewhere.",
    }


@pytest.mark.parametrize(
    ("heading", "body", "question"),
    [
        ("Iterators", "Iterators are objects that give one item after another.", "What are iterators?"),
        ("POSIX", "POSIX is a family of standards for systems.", "What is POSIX?"),
        ("What it does", "It reads the file and counts the words in it.", None),
        ("Installing", "There is one package for all of the systems.", None),
        ("Iterators", "Generators are functions that give one item after another.", None),
    ],
)
def test_what_is_no_question_asks_for_its_section(heading: str, body: str, question: str | None) -> None:
    (pair,) = (pair for pair in bridge_pairs(f"# {heading}\n\n{body}\n", ALL) if pair.rule != "cloze")
    assert pair.answer == body
    if question is None:
        assert pair.rule == "section"
        assert f'"{heading}"' in pair.prompt
    else:
        assert (pair.rule, pair.prompt) == ("question", question)


def test_sections_are_asked_for_with_the_title() -> None:
    title, limits = made(PAGE, "section")
    assert title.answer.startswith("Programs use memory")
    assert limits.answer == "- a list is no prose, but it is part of the section's answer"
    assert "Memory" in limits.prompt
    assert "Limits" in limits.prompt


def test_headings_of_one_depth_are_not_titles_of_each_other() -> None:
    text = "# One\n\nThe first part of two parts.\n\n# Two\n\nThe second part of two parts.\n"
    second = made(text, "section")[1]
    assert "Two" in second.prompt
    assert "One" not in second.prompt


def test_a_text_without_headings_gives_clozes() -> None:
    text = "The kernel gives memory in pages of a fixed size. Short one. Programs touch the pages when they run."
    pairs = bridge_pairs(text, ALL)
    assert [pair.rule for pair in pairs] == ["cloze", "cloze"]
    for pair in pairs:
        assert pair.prompt.partition("\n\n")[2].replace(BLANK, pair.answer) == pair.said
        assert pair.answer.lower() not in ("when", "they", "the")


def test_what_is_left_out_of_a_sentence_depends_on_seed_and_document() -> None:
    sentence = "Kernels manage memory pages through hardware tables everywhere."
    texts = [f"{sentence}\n\n{number}" for number in range(40)]
    assert len({made(text, "cloze")[0].answer for text in texts}) > 3
    seeds = [replace(ALL, seed=seed) for seed in range(40)]
    assert len({made(sentence, "cloze", settings)[0].answer for settings in seeds}) > 3
    assert bridge_pairs(PAGE, ALL) == bridge_pairs(PAGE, ALL)


def test_settings_limit_rules_number_and_length() -> None:
    assert {pair.rule for pair in bridge_pairs(PAGE, replace(ALL, rules=("question",)))} == {"question"}
    assert len(made(PAGE, "question", replace(ALL, per_document=2))) == 2
    assert not made(PAGE, "section", replace(ALL, min_words=30))
    two = "# A part\n\nThe first paragraph is short.\n\nThe second paragraph is longer than that.\n"
    assert made(two, "section", replace(ALL, max_answer_characters=30))[0].answer == "The first paragraph is short."
    assert not made(two, "section", replace(ALL, max_answer_characters=10))


def test_words_of_code_and_repeated_words_stay() -> None:
    text = "Memory.page and `table` and read-only and memory are memory of it all."
    assert not made(text, "cloze")


def test_a_form_with_blanks_gives_no_cloze() -> None:
    assert not made("Write the name of the kernel here: ____ and sign below the line.", "cloze")


_WORDS = ["Memory", "pages,", "tables.", "Kernel?", "give_it", "____", "über", "中文", "the"]
_PARTS = ["# Title", "## How to begin", "Part\n----", "2.1 Numbered", "CAPITALS", "```\ncode here\n\n```", "- item one"]
_PROSE = ["Pages are kept in tables. The tables are in memory!", "A title is what stands at the top of all pages."]
_BLOCKS = st.one_of(
    st.sampled_from(_PARTS + _PROSE),
    st.text(alphabet="aAé _.!?'\"#*=-`\n\r\u2028\x0c1", max_size=60),
    st.lists(st.sampled_from(_WORDS), max_size=15).map(" ".join),
)


@given(st.lists(_BLOCKS, max_size=8).map("\n\n".join), st.integers(0, 5))
def test_every_answer_is_verbatim(text: str, seed: int) -> None:
    for pair in bridge_pairs(text, BridgeSettings(min_words=3, seed=seed)):
        assert pair.answer
        assert pair.said in pair.evidence
        assert pair.evidence in text
        assert pair.answer in pair.said
        if pair.rule == "cloze":
            blanked = re.split(r"\n\n", pair.prompt, maxsplit=1)[1]
            assert blanked.count(BLANK) == 1
            assert blanked.replace(BLANK, pair.answer) == pair.said

"""Headings of Markdown, reStructuredText and plain text; what is none; nothing is rewritten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsft.corpus.sections import TextSection, blocks, is_prose, split_sections


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Title\n\nBody.\n\n## Part ##\nMore.\n", [("Title", "#", "Body."), ("Part", "##", "More.")]),
        ("Title\n=====\n\nBody.\n", [("Title", "above =", "Body.")]),
        ("*****\nTitle\n*****\n\nBody.\n", [("Title", "between *", "Body.")]),
        ("2.1 A part\n\nBody.\n", [("A part", "numbered 1", "Body.")]),
        ("THE PART\n\nBody.\n", [("THE PART", "capitals", "Body.")]),
        ("Before.\n\n# Title\n\n# Empty\n", [("", "", "Before."), ("Title", "#", ""), ("Empty", "#", "")]),
        ("```\n\n# a comment\n\n```\n", [("", "", "```\n\n# a comment\n\n```")]),
        ("Body.\n# a comment\n", [("", "", "Body.\n# a comment")]),
        ("A paragraph\nof two lines.\n\n1. an item.\n", [("", "", "A paragraph\nof two lines.\n\n1. an item.")]),
        ("    INDENTED\n\nBody.", [("", "", "    INDENTED\n\nBody.")]),
        ("# \n\n# 12\n\nBody.", [("", "", "# \n\n# 12\n\nBody.")]),
        ("", []),
        ("\n \n", []),
    ],
)
def test_sections(text: str, expected: list[tuple[str, str, str]]) -> None:
    assert split_sections(text) == [TextSection(*one) for one in expected]


def test_blocks_are_paragraphs_and_whole_fences() -> None:
    body = "One\ntwo.\n\n\n```\ncode\n\nmore\n```\n\nThree."
    assert [body[begin:end] for begin, end in blocks(body)] == ["One\ntwo.", "```\ncode\n\nmore\n```", "Three."]


@pytest.mark.parametrize(
    "block", ["- item", "* item", "1. item", "> said", "| a | b |", "    code", ".. note::", "```\nx"]
)
def test_what_is_no_prose(block: str) -> None:
    assert not is_prose(block)
    assert is_prose("A sentence.")


@given(
    st.lists(st.sampled_from(["# H", "H", "===", "", "a b.", "```", "  x", "1. A", "CAPS", "\r", "\x0c"]), max_size=12)
)
def test_nothing_is_rewritten_and_no_paragraph_is_lost(lines: list[str]) -> None:
    text = "\n".join(lines)
    sections = split_sections(text)
    at = 0
    for section in sections:
        for begin, end in blocks(section.body):
            at = text.index(section.body[begin:end], at)  # raises where it is not verbatim, or out of order
    said = "\n".join(f"{section.heading}\n{section.body}" for section in sections)
    assert said.count("a b.") == lines.count("a b.")

"""Headings, sections and paragraphs of a text, found by its lines; nothing is rewritten.

Headings: Markdown's (``## Like this``, or underlined; CommonMark 0.31, sections 4.2 and 4.3), reStructuredText's
(underlined, with or without a line above), and of plain text a line of its own that is numbered (``2.1 Like this``) or
in capitals. All stand at the left margin below an empty line. Lines inside a Markdown code fence are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_MOST_HEADING_CHARACTERS = 80
_FENCE = "```"
_HASHES = re.compile(r"#{1,6}[ \t]+(\S.*?)[ \t]*#*[ \t]*$")
_RULE = re.compile(r"([=\-~^\"'`*+#:.])\1{2,}[ \t]*$")
_NUMBERED = re.compile(r"\d+(\.\d+)*\.?[ \t]+(?=[^\W\d_])")
_QUOTES = "\"'(\u201c\u2018\u00ab"
_LIST_ITEM = re.compile(r"\d+[.)][ \t]")


@dataclass(frozen=True, slots=True)
class TextSection:
    """A heading and the text below it, up to the next heading of any depth.

    Attributes:
        heading: without its marks and number; empty for what stands before the first heading.
        style: how the heading is marked; headings of one depth have the same.
        body: as it stands in the text, without empty lines at its ends.
    """

    heading: str
    style: str
    body: str


def split_sections(text: str) -> list[TextSection]:
    """The sections of a text in order. What stands before the first heading comes first, where there is any."""
    lines = text.splitlines(keepends=True)
    sections: list[TextSection] = []
    heading, style, start, at, in_fence, may_begin = "", "", 0, 0, False, True
    while at <= len(lines):
        found = None
        if at < len(lines):
            in_fence ^= lines[at].lstrip().startswith(_FENCE)
            found = _heading(lines, at) if may_begin and not in_fence else None
        if found or at == len(lines):
            body = "".join(lines[start:at]).strip("\r\n")
            if heading or body.strip():
                sections.append(TextSection(heading, style, body))
        if found:
            heading, style, num_lines = found
            at += num_lines
            start, may_begin = at, True
        else:
            may_begin = at < len(lines) and not lines[at].strip()
            at += 1
    return sections


def blocks(body: str) -> Iterator[tuple[int, int]]:
    """Where each block (lines between empty lines; a code fence is one block) begins and ends, in characters."""
    begin: int | None = None
    at, end, in_fence = 0, 0, False
    for line in body.splitlines(keepends=True):
        in_fence ^= line.lstrip().startswith(_FENCE)
        if line.strip():
            begin = at if begin is None else begin
            end = at + len(line.rstrip("\r\n"))
        elif begin is not None and not in_fence:
            yield begin, end
            begin = None
        at += len(line)
    if begin is not None:
        yield begin, end


def is_prose(block: str) -> bool:
    """Whether a block is a paragraph at the left margin: no list, quotation, table, directive, code fence."""
    lines = block.splitlines()
    return (block[0].isalnum() or block[0] in _QUOTES) and not (
        _LIST_ITEM.match(block) or any(line[:1].isspace() or line.lstrip().startswith(_FENCE) for line in lines)
    )


def _heading(lines: list[str], at: int) -> tuple[str, str, int] | None:
    """The heading that begins at a line, its style, and how many lines it has."""
    line = lines[at].rstrip()
    following = lines[at + 1].rstrip() if at + 1 < len(lines) else ""
    if hashes := _HASHES.match(line):
        return _found(hashes[1], line.split(maxsplit=1)[0], 1)
    if _RULE.match(line) and at + 2 < len(lines) and lines[at + 2].rstrip() == line:
        return _found(following.strip(), f"between {line[0]}", 3)
    if line[:1].isspace() or line[:1] in ("-", "*", ">", "|", ""):
        return None
    if _RULE.match(following) and not _RULE.match(line):
        is_whole = len(following) >= len(line)  # a shorter one is Markdown's, which has = and - only
        return _found(line, f"above {following[0]}", 2) if is_whole or following[0] in "=-" else None
    if following or at + 1 == len(lines) or line[-1] in ".,;:!":
        return None
    if number := _NUMBERED.match(line):
        return _found(line, f"numbered {number[0].strip().strip('.').count('.')}", 1)
    return _found(line, "capitals", 1) if line.isupper() and sum(map(str.isalpha, line)) >= 3 else None


def _found(title: str, style: str, num_lines: int) -> tuple[str, str, int] | None:
    heading = _NUMBERED.sub("", title, count=1).strip()
    if len(heading) > _MOST_HEADING_CHARACTERS or not any(map(str.isalpha, heading)):
        return None
    return heading, style, num_lines

"""The failure matrices of the documentation: each row names tests, and they exist."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY

FILES = {"reliability.md": 30, "data.md": 18}
"""Documents with a matrix, and how many rows it has at least."""
TEST = re.compile(r"`(tests/[\w./]+|…)(?:::(\w+)(…?))?`")
"""A file or folder (…: the last one named), and a function of it (…: how its name begins)."""


def rows(name: str) -> list[str]:
    """The rows of a document's matrix."""
    text = (REPOSITORY / "docs" / name).read_text()
    table = text.split("| failure | what happens | test |", 1)[1].split("\n\n", 1)[0]
    return table.strip().splitlines()[1:]


@pytest.mark.parametrize("name", FILES)
def test_the_table_has_its_rows(name: str) -> None:
    assert len(rows(name)) >= FILES[name]
    assert [row for row in rows(name) if "`tests/" not in row] == []


@pytest.mark.parametrize(
    "row", [row for name in FILES for row in rows(name)], ids=lambda row: row.split("|")[1].strip()
)
def test_the_tests_of_a_row_exist(row: str) -> None:
    last = ""
    for place, function, is_begun in TEST.findall(row.rsplit("|", 2)[1]):
        last = last if place == "…" else place
        path = REPOSITORY / last
        assert path.exists(), place
        if function:
            assert re.search(rf"^def {function}{'' if is_begun else '[(]'}", path.read_text(), re.MULTILINE), function

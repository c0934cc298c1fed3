import ast
import inspect
import textwrap

import pytest

from dsft.demo.definitions import Pair, pairs_of_module

SOURCE = '''
"""Tools for boxes of every size and shape.

More about them.
"""
import this_module_does_not_exist

def open_box(box, *, force=False, **rest) -> "Box":
    """Open the box with
    all the force it needs. Then wait.

    The second paragraph is not the answer.
    """

def short(): "Too short."

def _private(a): """This one is nobody's business at all."""

class Box:
    """A box that can be opened and closed."""

    def close(self, slowly: bool = True):
        pass

    @property
    def size(self):
        """The number of things that fit."""
'''


@pytest.fixture(scope="module")
def pairs() -> dict[tuple[str, str], Pair]:
    return {(pair.kind, pair.name): pair for pair in pairs_of_module("pkg.boxes", SOURCE)}


def test_purposes_are_the_first_paragraphs_of_docstrings(pairs: dict[tuple[str, str], Pair]) -> None:
    answers = {pair.question: pair.answer for (kind, _), pair in pairs.items() if kind == "purpose"}
    assert answers == {
        "What is the module `pkg.boxes` for?": "Tools for boxes of every size and shape.",
        "What does `pkg.boxes.open_box` do?": "Open the box with all the force it needs. Then wait.",
        "What is the class `pkg.boxes.Box` for?": "A box that can be opened and closed.",
        "What is the property `pkg.boxes.Box.size`?": "The number of things that fit.",
    }


def test_signatures_are_of_functions_and_methods_only(pairs: dict[tuple[str, str], Pair]) -> None:
    answers = [pair.answer for (kind, _), pair in pairs.items() if kind == "signature"]
    assert answers == [
        "`pkg.boxes.open_box(box, *, force=False, **rest) -> 'Box'`",
        "`pkg.boxes.short()`",
        "`pkg.boxes.Box.close(self, slowly: bool=True)`",
    ]


def test_lookups_ask_for_the_name_by_its_first_sentence(pairs: dict[tuple[str, str], Pair]) -> None:
    pair = pairs["lookup", "pkg.boxes.open_box"]
    assert pair.question == "Which function of `pkg.boxes` is described so: Open the box with all the force it needs?"
    assert pair.answer == "`pkg.boxes.open_box`"


def test_private_modules_have_no_pairs() -> None:
    assert pairs_of_module("pkg._boxes", SOURCE) == []


def test_a_signature_is_what_inspect_says() -> None:
    """Against the live objects of a module whose sources we did not write."""
    source = inspect.getsource(textwrap)
    functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    asked = {
        pair.name.split(".")[1]: pair.answer for pair in pairs_of_module("textwrap", source) if pair.kind == "signature"
    }
    public = {name for name in functions if not name.startswith("_")}
    assert public
    for name in public:
        assert asked[name] == f"`textwrap.{name}{inspect.signature(getattr(textwrap, name))}`"

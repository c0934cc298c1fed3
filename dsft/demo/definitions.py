"""Questions about the public functions, classes and modules of a source file, answered by the file itself."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

_MIN_DOC_WORDS = 5
_MAX_DOC_CHARACTERS = 320
_MAX_SIGNATURE_CHARACTERS = 160
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer.

    Attributes:
        kind: purpose, signature or lookup.
        name: dotted name of what is asked about.
        evidence: what a copy of this pair elsewhere would have in common with it, whatever it is called there: the
            docstring, or the signature without the module's name.
    """

    kind: str
    name: str
    question: str
    answer: str
    evidence: str


def pairs_of_module(name: str, source: str) -> list[Pair]:
    """Pairs about one module's public definitions, methods included; nothing is executed.

    A private module (a leading underscore anywhere in the name) has none: nobody asks about it by that name.
    """
    if any(part.startswith("_") for part in name.split(".")):
        return []
    tree = ast.parse(source)
    pairs = []
    doc = first_paragraph(tree)
    if doc is not None:
        pairs.append(Pair("purpose", name, f"What is the module `{name}` for?", doc, doc))
    for qualified_name, node in public_definitions(name, tree):
        pairs.extend(_pairs_of_definition(name, qualified_name, node))
    return pairs


def first_paragraph(node: ast.Module | _Definition) -> str | None:
    """The docstring's first paragraph on one line; None if there is none or it is too short or too long to ask for."""
    doc = ast.get_docstring(node)
    if doc is None:
        return None
    paragraph = " ".join(inspect.cleandoc(doc).partition("\n\n")[0].split())
    if len(paragraph) > _MAX_DOC_CHARACTERS or len(paragraph.split()) < _MIN_DOC_WORDS:
        return None
    return paragraph


def signature(qualified_name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The call as one would write it in documentation: ``textwrap.wrap(text, width=70, **kwargs)``."""
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{qualified_name}({ast.unparse(node.args)}){result}"


def public_definitions(prefix: str, tree: ast.Module | ast.ClassDef) -> Iterator[tuple[str, _Definition]]:
    """Public functions and classes with their dotted names, outermost first; a redefinition counts once."""
    seen = set()
    for node in tree.body:
        if not isinstance(node, _Definition) or node.name.startswith("_") or node.name in seen:
            continue
        seen.add(node.name)
        qualified_name = f"{prefix}.{node.name}"
        yield qualified_name, node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(qualified_name, node)


def _pairs_of_definition(module: str, name: str, node: _Definition) -> Iterator[Pair]:
    doc = first_paragraph(node)
    what = _what(node)
    if doc is not None:
        questions = {
            "class": f"What is the class `{name}` for?",
            "function": f"What does `{name}` do?",
            "property": f"What is the property `{name}`?",
        }
        yield Pair("purpose", name, questions[what], doc, doc)
        sentence = doc.partition(". ")[0].rstrip(".")
        yield Pair("lookup", name, f"Which {what} of `{module}` is described so: {sentence}?", f"`{name}`", doc)
    if what == "function" and not isinstance(node, ast.ClassDef):
        text = signature(name, node)
        if len(text) <= _MAX_SIGNATURE_CHARACTERS:
            bare = signature(node.name, node)
            yield Pair("signature", name, f"What is the signature of `{name}`?", f"`{text}`", bare)


def _what(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return "property" if any(decorator.endswith("property") for decorator in decorators) else "function"

"""Renders chat templates: Jinja in a sandbox, as transformers does it, with two differences.

What a ``{% generation %}`` block wrote is found by noncharacters around it, so blocks inside macros and captures count
too; and the date is fixed, because a template that prints today's would give other tokens every day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from dsft.corpus.samples import BadRecord

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The day that ``strftime_now`` of a chat template sees (Llama 3's own default date)."""

_GENERATION_OPEN, _GENERATION_CLOSE = "\ufdd2", "\ufdd3"
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation: its text, and the character ranges that generation blocks wrote."""

    text: str
    generated: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        variables: what the template sees besides the messages (``bos_token``, ``eos_token``, ...).

    Attributes:
        has_markers: the template marks what the assistant generates.

    Raises:
        BadRecord: from ``render``, when the template refuses the conversation or fails.
        jinja2.TemplateSyntaxError: the source is not Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.has_markers = _GENERATION_TAG.search(source) is not None
        self._variables = dict(variables)
        self._template = _environment().from_string(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> Rendering:
        """Render messages (each with ``role`` and ``content``) and the schemas of the tools they may use."""
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise BadRecord(f"the chat template refuses this conversation: {error}") from error
        return _take_marks(text)


def _take_marks(marked: str) -> Rendering:
    if _GENERATION_OPEN not in marked:
        return Rendering(marked, ())
    pieces: list[str] = []
    generated: list[tuple[int, int]] = []
    length, start = 0, 0
    for piece in re.split(f"([{_GENERATION_OPEN}{_GENERATION_CLOSE}])", marked):
        if piece == _GENERATION_OPEN:
            start = length
        elif piece == _GENERATION_CLOSE:
            generated.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return Rendering("".join(pieces), tuple(generated))


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: puts marks around what the block writes."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own convention)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_GENERATION_OPEN}{caller()}{_GENERATION_CLOSE}"


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without private names: templates come from hubs and are not trusted."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a chat template may not set the private name {name!r}")
        super().__setitem__(name, value)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda form: TEMPLATE_DATE.strftime(form),
        namespace=_Namespace,
        dict=lambda *args, **items: dict(*args, **items),
    )
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

"""Counts with decimal suffixes: ``8192``, ``20M``, ``2.5B`` (K, M, B are powers of 1000 everywhere in dsft)."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PATTERN = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([KMBT]?)\s*$")


def parse_count(value: object) -> int:
    """Turn ``"2.5B"``, ``"8_192"``, ``8192`` or ``2e9`` into an exact integer.

    Raises:
        ValueError: the text is not a count, or it is not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("expected a count such as 8192, 20M or 2.5B (K, M, B, T are powers of 1000)")
    match = _PATTERN.match(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a count; write for example 8192, 20M or 2.5B (powers of 1000)")
    number = Decimal(match.group(1).replace("_", "")) * _FACTORS[match.group(2)]
    if number != number.to_integral_value():
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def _count_schema(minimum: int) -> WithJsonSchema:
    """What editors are told of a count: a number, or text with a suffix."""
    suffixed = {"type": "string", "pattern": r"^\s*[0-9][0-9_]*(\.[0-9]+)?([eE][+-]?[0-9]+)?\s*[KMBT]?\s*$"}
    return WithJsonSchema({"anyOf": [{"type": "number", "minimum": minimum}, suffixed]})


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0), _count_schema(0)]
PositiveCount = Annotated[int, BeforeValidator(parse_count), Field(ge=1), _count_schema(1)]

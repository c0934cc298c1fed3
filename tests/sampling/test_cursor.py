from __future__ import annotations

import json
from typing import Any

import pytest

from dsft.constants import ORDER_VERSION
from dsft.errors import CheckpointError
from dsft.sampling.cursor import cursor_from_json, cursor_to_json
from dsft.sampling.types import Cursor, SourcePosition

CURSOR = Cursor(
    window=7,
    pack=3,
    window_end_tokens=2**40,
    tokens_drawn=2**39,
    stage=1,
    stage_tokens_drawn=(5, 0),
    sources=(SourcePosition(1, 2, 3, 4), SourcePosition(0, 0, 0, 0)),
)


@pytest.mark.parametrize("end", [None, 0, 2**40])
def test_survives_json(end: int | None) -> None:
    cursor = Cursor(7, 3, end, 5, 1, (5, 0), CURSOR.sources)
    assert cursor_from_json(json.loads(json.dumps(cursor_to_json(cursor)))) == cursor


def test_another_order_version_is_refused() -> None:
    value = {**cursor_to_json(CURSOR), "order_version": ORDER_VERSION + 1}
    with pytest.raises(CheckpointError, match=f"version {ORDER_VERSION + 1}"):
        cursor_from_json(value)


@pytest.mark.parametrize(
    "damage", [{"window": None}, {"sources": [{"epoch": 1}]}, {"sources": 3}, {"stage_tokens_drawn": ["x"]}]
)
def test_a_damaged_cursor_is_named(damage: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        cursor_from_json({**cursor_to_json(CURSOR), **damage})
    value = cursor_to_json(CURSOR)
    del value["pack"]
    with pytest.raises(CheckpointError, match="pack"):
        cursor_from_json(value)

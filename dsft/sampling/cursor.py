"""The cursor as JSON, for checkpoints and logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dsft.constants import ORDER_VERSION
from dsft.errors import CheckpointError
from dsft.sampling.types import Cursor, SourcePosition


def cursor_to_json(cursor: Cursor) -> dict[str, Any]:
    """The cursor as plain JSON values, with the version of the data order it belongs to."""
    return {"order_version": ORDER_VERSION, **asdict(cursor)}


def cursor_from_json(value: Mapping[str, Any]) -> Cursor:
    """Read what :func:`cursor_to_json` wrote.

    Raises:
        CheckpointError: the cursor is of another data order, or not a cursor.
    """
    version = value.get("order_version")
    if version != ORDER_VERSION:
        raise CheckpointError(
            f"this checkpoint's data position is of data order version {version}, and this dsft draws documents in "
            f"order version {ORDER_VERSION}: the same position would mean other documents. Resume with the dsft that "
            "wrote it, or start a new run from its weights (model.path)."
        )
    try:
        end = value["window_end_tokens"]
        return Cursor(
            window=int(value["window"]),
            pack=int(value["pack"]),
            window_end_tokens=None if end is None else int(end),
            tokens_drawn=int(value["tokens_drawn"]),
            stage=int(value["stage"]),
            stage_tokens_drawn=tuple(int(tokens) for tokens in value["stage_tokens_drawn"]),
            sources=tuple(
                SourcePosition(**{key: int(number) for key, number in source.items()}) for source in value["sources"]
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint's data position cannot be read ({type(error).__name__}: {error}). The checkpoint is "
            "damaged; resume from an earlier one."
        ) from error

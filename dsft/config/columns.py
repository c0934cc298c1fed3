"""The fields of each record format, and the names that the data may have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

RecordFormat = Literal["text", "messages", "prompt_completion", "alpaca", "sharegpt"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "text": (),
    "tokens": (),
    "messages": ("messages", "tools", "role", "content"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "sharegpt": ("conversations", "system", "tools", "from", "value"),
}
"""Fields of each format that ``columns`` may give another name."""


def check_columns(record_format: str, columns: Mapping[str, str]) -> None:
    """Raise ValueError for a field that the format does not have, or two fields with one name."""
    known = COLUMNS[record_format]
    for name in columns:
        if name not in known:
            fields = f"its fields are {', '.join(known)}" if known else "text has one, named by text_field; tokens none"
            raise ValueError(f"columns: the format {record_format} has no field {name!r}; {fields}")
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"columns: two fields are read from one column: {sorted(columns.values())}")

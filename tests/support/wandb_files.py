"""Reads the file of an offline run of Weights & Biases: LevelDB's log format around protobuf records."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 32_768
_HEADER_BYTES = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Every protobuf record, checked by its crc32."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), _HEADER_BYTES, b""
    assert data[:4] == b":W&B"
    while at + _HEADER_BYTES <= len(data):
        if _BLOCK_BYTES - at % _BLOCK_BYTES < _HEADER_BYTES:
            at += _BLOCK_BYTES - at % _BLOCK_BYTES
            continue
        crc, length, kind = (int.from_bytes(data[at + a : at + b], "little") for a, b in ((0, 4), (4, 6), (6, 7)))
        body = data[at + _HEADER_BYTES : at + _HEADER_BYTES + length]
        assert crc == zlib.crc32(bytes([kind]) + body)
        at += _HEADER_BYTES + length
        parts += body
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Rows that were logged, without W&B's own columns."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            cells = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in cells.items() if not name.startswith("_")})
    return rows

"""A file of JSON lines that survives crashes: each line is flushed whole, and a half line of a crash is cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsft.fsio import save_error


class JsonLines:
    """Appends records to a file.

    Raises:
        SaveError: the file cannot be opened or written (names it).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  (open as long as the run lives)
            self._cut_half_line()
        except OSError as error:
            raise save_error(path, error) from error

    def _cut_half_line(self) -> None:
        end = self._file.seek(0, 2)
        tail_bytes = min(end, 1 << 20)
        self._file.seek(end - tail_bytes)
        tail = self._file.read(tail_bytes)
        if tail and not tail.endswith(b"\n"):
            self._file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line. NaN and infinities become null, which every JSON reader takes."""
        line = json.dumps(finite(record), allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as error:
            raise save_error(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def finite(value: Any) -> Any:
    """``value`` with floats that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; empty when there is none."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].split(b"\n") if line]

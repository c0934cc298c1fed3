"""A file of JSON lines that survives crashes: each line is flushed whole, and a half line of a crash is cut off."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from dsft.fsio import save_error

logger = logging.getLogger(__name__)


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
        size = end = self._file.seek(0, 2)
        while end > 0:  # end: everything from here on is without a line's end
            start = max(0, end - (1 << 20))
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            end = start + newline + 1
            if newline >= 0:
                break
        if end < size:
            logger.warning("%s ended in half a line, left by a crash; it is cut off", self._path)
            self._file.truncate(end)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line. NaN and infinities become null, which every JSON reader takes."""
        line = memoryview((json.dumps(finite(record), allow_nan=False) + "\n").encode())
        try:
            while line:
                line = line[self._file.write(line) :]  # a disk that is about to be full takes a part without an error
        except OSError as error:
            raise save_error(self._path, error) from error

    def sync(self) -> None:
        """Return once all lines are on the disk."""
        try:
            os.fsync(self._file.fileno())
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

"""How a worker that fails tells those that wait for it: a note in the store's folder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dsft.errors import DataError, DsftError, SaveError, StoppedEarly
from dsft.fsio import write_json

_OLD_NOTE_SECONDS = 120.0
"""A note that was there before this worker began is taken for one of an earlier attempt, unless its writer, who removes
it when it begins, leaves it there for this long."""


class FailureNotes:
    """The failure notes in some store folders. Removes this worker's own old ones when it is made."""

    def __init__(self, folders: Sequence[Path], worker: int) -> None:
        self._folders = list(dict.fromkeys(folders))
        self._worker = worker
        for folder in self._folders:
            _note_path(folder, worker).unlink(missing_ok=True)
        self._old = self._present()
        self._began = time.monotonic()

    def leave(self, error: BaseException) -> None:
        """Tell the others. On a full disk nobody can be told; then the error itself must do."""
        message = str(error) if isinstance(error, DsftError) else f"{type(error).__name__}: {error}"
        note = {"worker": self._worker, "host": socket.gethostname(), "message": message}
        note["stopped"] = isinstance(error, StoppedEarly)
        with suppress(SaveError):
            for folder in self._folders:
                write_json(_note_path(folder, self._worker), note)

    def check(self) -> None:
        """Raise DataError where another worker has failed, StoppedEarly where it was asked to stop."""
        old_counts = time.monotonic() - self._began > _OLD_NOTE_SECONDS
        for path, written in self._present().items():
            if old_counts or self._old.get(path) != written:
                note = json.loads(path.read_bytes())
                if note.get("stopped"):
                    raise StoppedEarly(note["message"])
                raise DataError(
                    f"worker {note['worker']} on {note['host']} could not prepare its part: {note['message']}"
                )

    def _present(self) -> dict[Path, int]:
        """Each note of another worker and when it was written."""
        own = _note_path(Path(), self._worker).name
        found: dict[Path, int] = {}
        for folder in self._folders:
            for name in os.listdir(folder):
                if name.startswith("failed-worker-") and name.endswith(".json") and name != own:
                    with suppress(FileNotFoundError):  # its writer has just begun again
                        found[folder / name] = (folder / name).stat().st_mtime_ns
        return found


def _note_path(folder: Path, worker: int) -> Path:
    return folder / f"failed-worker-{worker}.json"

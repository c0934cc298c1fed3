"""What each rank of a run said: ``logs/rank-00003.log`` in the run folder, and why it ended in ``rank-00003.error``.

A launcher mixes the output of all hosts, and the last lines of a failed run are those of ranks that only lost another.
"""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dsft.errors import DsftError, RankLostError
from dsft.fsio import save_error

FOLDER_NAME = "logs"
_LEVELS = {"info": ("INFO", "WARNING", "ERROR"), "warning": ("WARNING", "ERROR"), "error": ("ERROR",)}
_LINE = re.compile(r"(?P<when>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (?P<level>[A-Z]+) ")


@dataclass(frozen=True, slots=True)
class RankError:
    """Why a rank ended.

    Attributes:
        is_consequence: it only says that another rank is gone.
    """

    rank: int
    host: str
    attempt: str
    text: str
    is_consequence: bool

    def describe(self) -> str:
        """For a person."""
        return f"rank {self.rank} on {self.host} failed first: {self.text}"


class RankLog:
    """The files of one rank; open from the moment on at which the run has its folder.

    Args:
        run_dir: the run's folder. rank: of this process. attempt: id of this start.
    """

    def __init__(self, run_dir: Path, rank: int, attempt: str) -> None:
        self._path = run_dir / FOLDER_NAME / f"rank-{rank:05d}.log"
        self._rank, self._attempt = rank, attempt
        self._handler: logging.Handler | None = None

    def open(self) -> None:
        """From now on everything that this rank says from INFO up is in its file, too.

        Raises:
            SaveError: it cannot be written.
        """
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._path.with_suffix(".error").unlink(missing_ok=True)
            self._handler = logging.FileHandler(self._path, encoding="utf-8")
        except OSError as error:
            raise save_error(self._path, error) from error
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("dsft").addHandler(self._handler)

    def write_error(self, error: BaseException) -> None:
        """Keep why this rank ends. A disk that takes nothing any more must not hide the error itself."""
        if self._handler is None:
            return
        text = str(error) or type(error).__name__
        if not isinstance(error, DsftError):
            text = f"{type(error).__name__}: {text}"
        record = RankError(
            self._rank, socket.gethostname(), self._attempt, text.strip(), isinstance(error, RankLostError)
        )
        trace = (type(error), error, error.__traceback__)
        self._handler.handle(logging.LogRecord("dsft", logging.ERROR, "", 0, "%s", (record.text,), trace))
        try:
            self._path.with_suffix(".error").write_text(json.dumps(asdict(record)))
        except OSError:
            return

    def close(self) -> None:
        """Write no more."""
        if self._handler is not None:
            logging.getLogger("dsft").removeHandler(self._handler)
            self._handler.close()
            self._handler = None


def first_error(run_dir: Path, attempt: str) -> RankError | None:
    """The error of the rank of a start that failed first, by the clock of the file system that all hosts share.

    What only tells of another rank's end counts if there is nothing else.
    """
    errors = []
    for path in (run_dir / FOLDER_NAME).glob("rank-*.error"):
        try:
            found = RankError(**json.loads(path.read_text()))
            when = path.stat().st_mtime_ns
        except (OSError, ValueError, TypeError):
            continue
        if found.attempt == attempt:
            errors.append((found.is_consequence, when, found.rank, found))
    return min(errors)[3] if errors else None


class LogReader:
    """Reads the logs of a run as they grow.

    Args:
        run_dir: the run's folder. ranks: whose; empty: all. level: the least that is shown: info, warning or error.
    """

    def __init__(self, run_dir: Path, ranks: frozenset[int], level: str) -> None:
        self._folder, self._ranks, self._levels = run_dir / FOLDER_NAME, ranks, _LEVELS[level]
        self._positions: dict[int, int] = {}
        self._shown: dict[int, bool] = {}

    def has_files(self) -> bool:
        """There is something to read."""
        return bool(self._files())

    def new_lines(self) -> Iterator[tuple[int, str]]:
        """(rank, line) of what was written since the last call, in the order of time; a traceback stays together."""
        entries = []
        for rank, path in self._files().items():
            when = ""
            for line in self._read(rank, path):
                match = _LINE.match(line)
                if match is not None:
                    self._shown[rank] = match["level"] in self._levels
                    when = match["when"]
                if self._shown.get(rank):
                    entries.append((when, rank, line))
        for _, rank, line in sorted(entries, key=lambda entry: entry[:2]):  # stable: a rank's lines keep their order
            yield rank, line

    def _files(self) -> dict[int, Path]:
        found = {int(path.stem.removeprefix("rank-")): path for path in sorted(self._folder.glob("rank-*.log"))}
        return {rank: path for rank, path in found.items() if not self._ranks or rank in self._ranks}

    def _read(self, rank: int, path: Path) -> list[str]:
        """Whole lines only: a half one is read again with its rest."""
        with open(path, "rb") as file:
            file.seek(self._positions.get(rank, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._positions[rank] = self._positions.get(rank, 0) + len(whole)
        return whole.decode(errors="replace").splitlines()

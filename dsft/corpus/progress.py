"""What preparation reports while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from dsft.corpus.shard import ShardProgress

_REPORT_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """What one worker has done so far, over all sources of the call.

    Attributes:
        worker: which one.
        source: the source it is at.
        documents, tokens, text_bytes: written by this worker in this call.
        read_bytes: raw bytes it has read, and its part of those found prepared.
        prepared_bytes: those among ``read_bytes`` that were found prepared.
        total_bytes: ``read_bytes``, what is left of its shard, and its part of what no worker has taken yet.
        line: something to say to the user; usually empty.
    """

    worker: int
    source: str
    documents: int
    tokens: int
    text_bytes: int
    read_bytes: int
    prepared_bytes: int
    total_bytes: int
    line: str = ""


def no_progress(progress: PrepareProgress) -> None:
    """Say nothing."""


class ProgressLines:
    """Turns the reports of all workers into a plain line every few seconds (and every ``line`` at once).

    Args:
        say: takes one line.
    """

    def __init__(self, say: Callable[[str], None], every_seconds: float = 5.0) -> None:
        self._say, self._every_seconds = say, every_seconds
        self._latest: dict[int, PrepareProgress] = {}
        self._began = self._said = 0.0

    def __call__(self, progress: PrepareProgress) -> None:
        """Take one report. The clock starts with the first."""
        if not self._latest:
            self._began = self._said = time.monotonic()
        self._latest[progress.worker] = progress
        if progress.line:
            self._say(f"prepare: {progress.line}")
        if time.monotonic() - self._said >= self._every_seconds:
            self._said = time.monotonic()
            self._say(f"prepare: {progress.source}: {self.summary()}")

    @property
    def done_bytes(self) -> tuple[int, int]:
        """Raw bytes done and in all, over the workers heard of."""
        reports = self._latest.values()
        return sum(report.read_bytes for report in reports), sum(report.total_bytes for report in reports)

    def summary(self) -> str:
        """Documents, tokens, their speed, that of text, and the time left, over all workers."""
        reports = list(self._latest.values())
        seconds = max(time.monotonic() - self._began, 1e-9)
        documents, tokens, text_bytes, read, found = (
            sum(getattr(report, name) for report in reports)
            for name in ("documents", "tokens", "text_bytes", "read_bytes", "prepared_bytes")
        )
        total = self.done_bytes[1]
        left = (total - read) * seconds / (read - found) if read > found else 0.0
        share = 100.0 * read / total if total else 100.0
        return (
            f"{share:.0f} %, {documents:,} documents, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, "
            f"{text_bytes / seconds / 1e6:.1f} MB/s, {timedelta(seconds=round(left))} left"
        )


class Reporter:
    """Adds up shards and calls ``progress`` at most five times a second."""

    def __init__(self, progress: Callable[[PrepareProgress], None], worker: int) -> None:
        self._progress = progress
        self._worker, self._left_bytes = worker, 0
        self._source = ""
        self._documents = self._tokens = self._text_bytes = self._read_bytes = self._prepared_bytes = 0
        self._shard = ShardProgress(0, 0, 0, 0)
        self._reported = 0.0

    def begin_source(self, name: str) -> None:
        """Say which source is being prepared."""
        self._source = name

    def expect(self, raw_bytes: int) -> None:
        """So much is left for this worker, as far as can be seen: the current shard, and a part of what is free."""
        self._left_bytes = raw_bytes

    def at(self, shard: ShardProgress) -> None:
        """The current shard's state."""
        self._shard = shard
        self.tick()

    def tick(self) -> None:
        """Report where nothing new happens, too."""
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._report("")

    def end_shard(self, raw_bytes: int) -> None:
        """The current shard is published."""
        self._documents += self._shard.documents
        self._tokens += self._shard.tokens
        self._text_bytes += self._shard.text_bytes
        self._read_bytes += raw_bytes
        self._left_bytes = max(self._left_bytes - raw_bytes, 0)
        self._shard = ShardProgress(0, 0, 0, 0)

    def skip(self, raw_bytes: int) -> None:
        """Raw data of this length was found prepared."""
        self._read_bytes += raw_bytes
        self._prepared_bytes += raw_bytes

    def say(self, line: str) -> None:
        """Tell the user something now."""
        self._report(line)

    def end(self) -> None:
        """Report the final numbers."""
        self._report("")

    def _report(self, line: str) -> None:
        self._reported = time.monotonic()
        self._progress(
            PrepareProgress(
                worker=self._worker,
                source=self._source,
                documents=self._documents + self._shard.documents,
                tokens=self._tokens + self._shard.tokens,
                text_bytes=self._text_bytes + self._shard.text_bytes,
                read_bytes=self._read_bytes + self._shard.read_bytes,
                prepared_bytes=self._prepared_bytes,
                total_bytes=self._read_bytes + self._left_bytes,
                line=line,
            )
        )

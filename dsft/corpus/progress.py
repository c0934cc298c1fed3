"""What preparation reports while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dsft.corpus.shard import ShardProgress

_REPORT_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """What one worker has done so far, over all sources of the call.

    Attributes:
        worker: which one.
        source: the source it is at.
        documents, tokens, text_bytes: written by this worker in this call.
        read_bytes: raw bytes it has read or found prepared, of its ``total_bytes``.
        prepared_bytes: those among ``read_bytes`` that were found prepared.
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


class Reporter:
    """Adds up shards and calls ``progress`` at most five times a second."""

    def __init__(self, progress: Callable[[PrepareProgress], None], worker: int, total_bytes: int) -> None:
        self._progress = progress
        self._worker, self._total_bytes = worker, total_bytes
        self._source = ""
        self._documents = self._tokens = self._text_bytes = self._read_bytes = self._prepared_bytes = 0
        self._shard = ShardProgress(0, 0, 0, 0)
        self._reported = 0.0

    def begin_source(self, name: str) -> None:
        """Say which source is being prepared."""
        self._source = name

    def at(self, shard: ShardProgress) -> None:
        """The current shard's state."""
        self._shard = shard
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._report("")

    def end_shard(self, raw_bytes: int) -> None:
        """The current shard is published."""
        self._documents += self._shard.documents
        self._tokens += self._shard.tokens
        self._text_bytes += self._shard.text_bytes
        self._read_bytes += raw_bytes
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
                total_bytes=self._total_bytes,
                line=line,
            )
        )

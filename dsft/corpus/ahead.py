"""Tokenises raw shards in the order in which somebody wishes for them, while what is there is trained on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsft.corpus.claims import claimed
from dsft.corpus.listing import RawShard, describe_file
from dsft.corpus.prepare import Job, published
from dsft.corpus.progress import Reporter
from dsft.errors import DataError

_POLL_SECONDS = 0.2


class Wishes:
    """Which shards of which source are wished for next; written by one thread, read by another."""

    def __init__(self) -> None:
        self._wished: dict[int, deque[int]] = {}
        self._changed = threading.Condition()
        self._has_ended = False

    def put(self, source: int, shards: Sequence[int]) -> None:
        """Replace what is wished of a source (its number), the first one first."""
        with self._changed:
            self._wished[source] = deque(shards)
            self._changed.notify()

    def put_back(self, source: int, shard: int) -> None:
        """A shard that could not be made now: after all others."""
        with self._changed:
            self._wished.setdefault(source, deque()).append(shard)

    def end(self) -> None:
        """Nothing is wished for any more."""
        with self._changed:
            self._has_ended = True
            self._changed.notify()

    def take(self) -> tuple[int, int] | None:
        """The next (source, shard), of the sources in turn; waits for one. None after :meth:`end`."""
        with self._changed:
            while not self._has_ended and not any(self._wished.values()):
                self._changed.wait()
            if self._has_ended:
                return None
            source = next(source for source, shards in self._wished.items() if shards)
            shards = self._wished.pop(source)
            self._wished[source] = shards  # the last one next time
            return source, shards.popleft()


def prepare_wished(jobs: Mapping[int, Job], wishes: Wishes, reporter: Reporter, *, is_alone: bool) -> None:
    """Make and publish what is wished for, until the wishes end. Shards that another host is at are left to it.

    Args:
        jobs: the sources, by their numbers.
        is_alone: no other host makes shards of these sources.

    Raises:
        DataError: bad data (names file and line), or a raw file that is not the one of the listing any more.
        SaveError: the store cannot be written.
    """
    while (wish := wishes.take()) is not None:
        source, shard = wish
        job = jobs[source]
        raw = job.shards[shard]
        with claimed(job.folder, shard, is_alone=is_alone) as is_mine:
            if published(job, shard, raw, None) is not None:
                continue
            if is_mine:
                _check_unchanged(job, raw)
                reporter.begin_source(job.name)
                job.write_shard(shard, raw, None, reporter)
                reporter.end_shard(raw.num_bytes)
        if not is_mine:
            wishes.put_back(source, shard)
            time.sleep(_POLL_SECONDS)


def _check_unchanged(job: Job, raw: RawShard) -> None:
    """A shard may be read days after it was listed. (What is remote is compared when it is read.)"""
    for file in raw.files:
        if file.is_remote:
            continue
        found = describe_file(Path(file.path), Path(file.path).parent)
        if (found.num_bytes, found.version) != (file.num_bytes, file.version):
            raise DataError(
                f"data source {job.name!r}: {file.path} was changed after the run began ({file.num_bytes} bytes then, "
                f"{found.num_bytes} now), and it is not tokenised yet. Put the old file back, with its time of change "
                "(cp -p), and resume; or start a new run."
            )

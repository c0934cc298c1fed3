"""A token store whose shards appear while it is read: whoever needs one waits until it is published in the folder.

The order of a source depends on its number of raw shards alone (``sampling.order``), so the plan over shards that are
still raw is the plan over the prepared store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dsft.config.models import RunConfig, SourceSection
from dsft.corpus.prepare import Job, make_folder, make_job, published
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import StoppedEarly
from dsft.fsio import write_json
from dsft.launch.owner import RunFolder
from dsft.launch.progress import Progress
from dsft.launch.stop import StopFlag
from dsft.store.files import open_file
from dsft.store.layout import index_path, token_dtype, tokens_path
from dsft.store.manifest import UNKNOWN, Manifest
from dsft.store.reader import SourceStore
from dsft.train.store_identity import raw_shards_path
from dsft.train.stores import store_folder
from dsft.train.streaming import AheadProcess, Preparer
from dsft.world import World

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_WAIT_LINE_SECONDS = 10.0


class StreamedFiles:
    """``ShardFiles`` of a source that is tokenised while it is trained on. Opening an index waits for its shard.

    Args:
        job: the source, its raw shards and its store's folder.
        source: its number in the configuration.
        preparer: tokenises what will be needed.
        progress: told while this rank waits, so that it is not taken for one that hangs.
    """

    are_verified = False
    max_mapped_bytes = None

    def __init__(self, job: Job, source: int, preparer: Preparer, progress: Progress) -> None:
        self.place = str(job.folder.absolute())
        self.manifest = _manifest(job)
        self.fingerprint = self.manifest.raw_identity
        self._job, self._source, self._preparer, self._progress = job, source, preparer, progress
        self._may_wait = True

    def open_index(self, shard: int) -> BinaryIO:
        """See ``ShardFiles``. Waits for the shard.

        Raises:
            DataError: whatever ended the preparer, on this host or another.
            StoppedEarly: a rank was asked to stop, or nobody needs the shard any more (``without_waiting``).
        """
        if not self._is_there(shard):
            with self._progress.waiting_for_data():
                self._wait(shard)
        return open_file(index_path(self._job.folder, shard))

    def open_tokens(self, shard: int, block_crc32: npt.NDArray[np.uint32]) -> BinaryIO:
        """See ``ShardFiles``; the hashes are compared when a block is first read."""
        return open_file(tokens_path(self._job.folder, shard))

    def will_need(self, shards: Sequence[int]) -> None:
        """See ``ShardFiles``."""
        missing = [shard for shard in shards if not self._is_there(shard)]
        self._preparer.wish(self._source, self._job, missing)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """See ``ShardFiles``."""
        self._may_wait = False
        try:
            yield
        finally:
            self._may_wait = True

    def _is_there(self, shard: int) -> bool:
        return published(self._job, shard, self._job.shards[shard], None) is not None

    def _wait(self, shard: int) -> None:
        began = said = time.monotonic()
        while not self._is_there(shard):
            self._preparer.check()
            if not self._may_wait:
                raise StoppedEarly(f"{self._job.shards[shard].name} of {self._job.name} is not waited for any more.")
            now = time.monotonic()
            if now - said >= _WAIT_LINE_SECONDS:
                said = now
                name = self._job.shards[shard].name
                logger.info("waiting for %s of %s to be tokenised (%.0f s)", name, self._job.name, now - began)
            time.sleep(_POLL_SECONDS)


def _manifest(job: Job) -> Manifest:
    """What is known of a store before its shards are."""
    num_shards = len(job.shards)
    unknown = np.full(num_shards, UNKNOWN, np.int64)
    return Manifest(
        name=job.name,
        recipe=job.recipe,
        listing=job.listing,
        token_dtype=token_dtype(job.vocab_tokens).name,
        vocab_tokens=job.vocab_tokens,
        raw_names=tuple(raw.name for raw in job.shards),
        num_documents=unknown,
        num_tokens=unknown,
        num_targets=unknown,
        num_bytes=unknown,
        index_crc32=unknown,
        counts={},
    )


@dataclass(frozen=True, slots=True)
class Streaming:
    """Opens the sources that are tokenised while they are trained on.

    Attributes:
        preparer: tokenises what will be needed.
        progress: of this rank.
    """

    preparer: Preparer
    progress: Progress

    def open(self, config: RunConfig, tokenizer: Tokenizer) -> dict[int, SourceStore]:
        """Their stores by their numbers in the configuration; no shard of them need exist.

        The list of a source's raw shards is written beside them, so that a later start can name what was replaced.

        Raises:
            DataError: a path that does not exist, or holds nothing.
            SaveError: a store's folder cannot be written.
        """
        stores = {}
        for source, section in enumerate(config.data.sources):
            if is_streamed(section):
                job = make_job(section, tokenizer, store_folder(config), config.data.bad_records)
                make_folder(job.folder)
                files = StreamedFiles(job, source, self.preparer, self.progress)
                path = raw_shards_path(job.folder, files.fingerprint)
                if not path.exists():
                    write_json(path, [[raw.files[0].path, raw.identity] for raw in job.shards])
                stores[source] = SourceStore(files)
        return stores


def begin_streaming(
    config: RunConfig, world: World, folder: RunFolder, stop: StopFlag, progress: Progress
) -> Streaming | None:
    """Start what tokenises ahead on this host; None where the configuration does not ask for it."""
    return Streaming(AheadProcess(config, world, folder, stop), progress) if config.data.streaming else None


def is_streamed(section: SourceSection) -> bool:
    """Whether ``data.streaming`` is for this source: what is tokenised already is only indexed, before the start."""
    return section.format != "tokens"

"""Fetches files into the cache before they are needed, in threads of their own."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

from dsft.errors import DsftError
from dsft.store.shard_cache import CachedFile, ShardCache

logger = logging.getLogger(__name__)

NUM_THREADS = 8
"""Requests in flight at once, because a request spends most of its time in waiting."""


class Prefetcher:
    """Fetches what its users will need, in turn, in the order they say.

    The threads start with the first wish and end with the process: one that is killed in the middle of a file leaves
    nothing that counts.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wished: dict[str, deque[CachedFile]] = {}
        self._changed = threading.Condition()
        self._has_started = False

    def wish(self, user: str, files: Sequence[CachedFile]) -> None:
        """Replace what ``user`` will need by ``files``, the first one first. Returns at once."""
        with self._changed:
            self._wished[user] = deque(files)
            if not self._has_started:
                self._has_started = True
                for number in range(NUM_THREADS):
                    threading.Thread(target=self._work, name=f"dsft-prefetch-{number}", daemon=True).start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            user, file = self._next()
            try:
                self._cache.fetch(file)
            except DsftError as error:
                logger.warning("%s It will be asked for again when it is needed.", error)
                with self._changed:
                    self._wished[user].clear()

    def _next(self) -> tuple[str, CachedFile]:
        with self._changed:
            while not any(self._wished.values()):
                self._changed.wait()
            user = next(user for user, files in self._wished.items() if files)
            files = self._wished.pop(user)
            self._wished[user] = files  # the last one next time
            return user, files.popleft()

"""Prepared token stores behind a web server, read through a cache."""

from __future__ import annotations

from pathlib import Path

from dsft.store.cached_files import CachedFiles
from dsft.store.prefetch import Prefetcher
from dsft.store.reader import SourceStore
from dsft.store.shard_cache import ShardCache
from tests.support.web_server import WebServer


def serve(server: WebServer, store: SourceStore) -> str:
    """Copy a store to the server, as it lies in its folder; returns its URL."""
    folder = Path(store.place)
    server.files |= {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return server.url(folder.name)


def open_remote_store(url: str, folder: Path, max_bytes: int = 10**9) -> SourceStore:
    """The store at ``url`` through a cache in ``folder``, as a process of its own would open it."""
    cache = ShardCache(folder, max_bytes)
    return SourceStore(CachedFiles(url, cache, Prefetcher(cache), max_bytes))


def cached_bytes(folder: Path) -> int:
    """What a cache takes on the disk."""
    return sum(path.stat().st_size for path in (folder / "files").iterdir())

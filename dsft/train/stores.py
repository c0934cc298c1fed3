"""Opens the token stores of a run: prepared here first, or read from where they were copied to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dsft.config.models import RunConfig
from dsft.config.remote_path import is_remote
from dsft.corpus.prepare import Section, check_prepared, prepare_sources, store_name
from dsft.corpus.progress import PrepareProgress
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import ConfigError, DataError
from dsft.store.cached_files import CachedFiles
from dsft.store.prefetch import Prefetcher
from dsft.store.reader import SourceStore
from dsft.store.shard_cache import ShardCache


def store_folder(config: RunConfig) -> Path:
    """Where token stores are prepared. Raises ConfigError where they are read from a URL."""
    place = config.data.store_dir
    if place is not None and is_remote(place):
        raise ConfigError(
            f"data.store_dir is {place}: token stores are read from there, not prepared. Prepare them in a folder with "
            "the same configuration (dsft prepare RUN.yaml --set data.store_dir=FOLDER) and copy what is in it there."
        )
    return Path(place) if place else Path(config.run.dir).parent / "store"


def open_stores(
    config: RunConfig,
    sections: Sequence[Section],
    tokenizer: Tokenizer,
    progress: Callable[[PrepareProgress], None],
    *,
    worker: int,
    num_workers: int,
) -> list[SourceStore]:
    """The stores of sources and held-out sets, in order; those in a folder are prepared first, by all workers together.

    Raises:
        DataError: as ``prepare_sources``; a store at a URL that is not there, or is of another configuration.
    """
    place = config.data.store_dir
    if place is not None and is_remote(place):
        names = [store_name(section, tokenizer) for section in sections]
        try:
            stores = open_places(config, [f"{place.rstrip('/')}/{name}" for name in names])
        except DataError as error:
            raise DataError(
                f"{error} A source's store has the name that `dsft prepare` gives it under this configuration, with "
                "this tokenizer and these paths."
            ) from error
        for section, store in zip(sections, stores, strict=True):
            check_prepared(section, tokenizer, config.data.bad_records, store.manifest, store.place)
        return stores
    bad_records = config.data.bad_records
    folders = prepare_sources(sections, tokenizer, store_folder(config), worker, num_workers, bad_records, progress)
    return [SourceStore(folder) for folder in folders]


def open_places(config: RunConfig, places: Sequence[str]) -> list[SourceStore]:
    """The stores in these folders or at these URLs, which share one cache. Raises DataError."""
    remote = [place for place in places if is_remote(place)]
    if not remote:
        return [SourceStore(Path(place)) for place in places]
    section = config.data
    folder = Path(section.cache_dir) if section.cache_dir else Path(config.run.dir).parent / "store-cache"
    cache = ShardCache(folder.absolute(), section.cache_bytes)
    prefetcher = Prefetcher(cache)
    share_bytes = section.cache_bytes // len(remote)
    return [
        SourceStore(CachedFiles(place, cache, prefetcher, share_bytes) if is_remote(place) else Path(place))
        for place in places
    ]

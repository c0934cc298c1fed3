"""Training data from a store in an object store: the same batches as from a folder, however small the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsft.errors import DataError
from dsft.store.reader import SourceStore
from tests.batch.test_loader import content, make_loader, make_planner, read
from tests.support.remote_store import cached_bytes, open_remote_store, serve
from tests.support.stores import text_document, two_stores, write_store
from tests.support.web_server import WebServer


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceStore, ...]:
    return two_stores(tmp_path_factory.mktemp("stores"), num_shards=8)


@pytest.mark.parametrize("max_bytes", [10**9, 5000])
def test_batches_are_those_of_the_folder(
    max_bytes: int, tmp_path: Path, server: WebServer, stores: tuple[SourceStore, ...]
) -> None:
    planner = make_planner(stores)
    expected = [content(step) for step in read(make_loader(stores), planner.start())]
    remote_stores = tuple(open_remote_store(serve(server, store), tmp_path / "cache", max_bytes) for store in stores)
    loader = make_loader(remote_stores)
    found = [content(step) for step in read(loader, planner.start())]
    assert found == expected
    fetched = [name for name, _, _ in server.gets if "shard-" in name]
    is_large = max_bytes == 10**9
    assert (len(fetched) == len(set(fetched))) is is_large, "only a small cache fetches a file again"
    assert cached_bytes(tmp_path / "cache") <= sum(map(len, server.files.values()))


def test_shards_of_a_store_that_has_grown_are_the_same_files(tmp_path: Path, server: WebServer) -> None:
    documents = [text_document([1, 2, number]) for number in range(30)]
    few = write_store(tmp_path / "few", documents[:20], num_shards=2)
    more = write_store(tmp_path / "more", documents, num_shards=3)
    for store in (few, more):
        remote_store = open_remote_store(serve(server, store), tmp_path / "cache")
        for shard in range(store.num_shards):
            np.testing.assert_array_equal(remote_store.tokens(shard), store.tokens(shard))
    assert sum("shard-" in name for name, _, _ in server.gets) == 2 * 3


def test_a_store_that_is_not_there_or_is_damaged_is_named(
    tmp_path: Path, server: WebServer, stores: tuple[SourceStore, ...]
) -> None:
    url = serve(server, stores[0])
    server.files["a/manifest.json"] = server.files["a/manifest.json"].replace(b'"num_tokens":[', b'"num_tokens":[1')
    with pytest.raises(DataError, match=r"a/manifest\.json is damaged"):
        open_remote_store(url, tmp_path)
    with pytest.raises(DataError, match=r"none/manifest\.json cannot be read: there is no such file"):
        open_remote_store(server.url("none"), tmp_path)

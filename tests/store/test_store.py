from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dsft.errors import DataError, SaveError
from dsft.store.layout import BLOCK_BYTES, index_path, token_dtype, tokens_path
from dsft.store.manifest import read_manifest
from dsft.store.reader import SourceStore, read_index_metadata, verify_shard
from dsft.store.types import Document
from dsft.store.writer import ShardWriter
from tests.support.stores import text_document, write_store


@st.composite
def documents(draw: st.DrawFn) -> Document:
    ids = draw(st.lists(st.integers(0, 65_534), min_size=1, max_size=40))
    edges = draw(st.lists(st.integers(0, len(ids)), unique=True, max_size=8).map(sorted))
    spans = np.array(edges[: len(edges) // 2 * 2], np.int32).reshape(-1, 2)
    weights = np.arange(1, len(spans) + 1, dtype=np.float32) / 4
    return Document(np.array(ids, np.int32), spans, weights, draw(st.integers(0, 1000)))


@settings(max_examples=20, deadline=None)
@given(docs=st.lists(documents(), max_size=12), num_shards=st.integers(1, 4), vocab=st.sampled_from([65_535, 65_536]))
def test_what_is_written_is_read(
    docs: list[Document], num_shards: int, vocab: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = write_store(tmp_path_factory.mktemp("store"), docs, num_shards=num_shards, vocab_tokens=vocab)
    assert store.num_shards == num_shards
    found = []
    for shard in range(num_shards):
        index, tokens = store.index(shard), store.tokens(shard)
        assert tokens.dtype == (np.uint16 if vocab < 65_536 else np.uint32)
        assert index.token_offsets[-1] == len(tokens)
        verify_shard(store, shard)
        for number in range(len(index.lengths)):
            ids = tokens[index.token_offsets[number] : index.token_offsets[number + 1]]
            spans = slice(index.span_offsets[number], index.span_offsets[number + 1])
            found.append((ids, index.spans[spans], index.span_weights[spans], index.num_bytes[number]))
            assert len(ids) == index.lengths[number]
    assert len(found) == len(docs)
    for (ids, spans, weights, num_bytes), doc in zip(found, docs, strict=True):
        np.testing.assert_array_equal(ids, doc.ids)
        np.testing.assert_array_equal(spans, doc.spans)
        np.testing.assert_array_equal(weights, doc.span_weights)
        assert num_bytes == doc.num_bytes
    targets = sum(max(0, int(e) - max(int(s), 1)) for doc in docs for s, e in doc.spans)
    assert int(store.manifest.num_targets.sum()) == targets
    assert int(store.manifest.num_bytes.sum()) == sum(doc.num_bytes for doc in docs)


def test_files_are_what_the_documentation_says(tmp_path: Path) -> None:
    write_store(tmp_path, [text_document([1, 2, 300])])
    assert (tmp_path / "shard-000000.tokens").read_bytes() == np.array([1, 2, 300], "<u2").tobytes()
    index = load_file(tmp_path / "shard-000000.index")
    assert {name: (array.dtype.name, array.shape) for name, array in index.items()} == {
        "lengths": ("int32", (1,)),
        "num_bytes": ("int32", (1,)),
        "span_offsets": ("int64", (2,)),
        "spans": ("int32", (1, 2)),
        "span_weights": ("float32", (1,)),
        "block_crc32": ("uint32", (1,)),
    }


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    docs = [text_document(range(1, n)) for n in range(2, 200)]
    for name in ("a", "b"):
        write_store(tmp_path / name, docs, num_shards=3)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b"))
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_the_manifest_is_small(tmp_path: Path) -> None:
    few = write_store(tmp_path / "few", [text_document([1])] * 10, num_shards=10)
    many = write_store(tmp_path / "many", [text_document(range(900))] * 110, num_shards=110)
    sizes = [(Path(store.place) / "manifest.json").stat().st_size for store in (few, many)]
    assert (sizes[1] - sizes[0]) / 100 < 100  # and up to 100 more for a long file name


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = write_store(tmp_path / "a", [text_document([1, 2]), text_document([3])])
    second = write_store(tmp_path / "b", [text_document([1, 2]), text_document([3])])
    other = write_store(tmp_path / "c", [text_document([1, 2]), text_document([4])])
    assert first.fingerprint == second.fingerprint != other.fingerprint


def flip_bit(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_the_tokens_is_found_in_its_block(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document([5] * 100_000)])
    verify_shard(store, 0)
    flip_bit(tokens_path(tmp_path, 0), 2 * BLOCK_BYTES + 7)
    with pytest.raises(DataError, match=r"shard-000000.tokens: block 2 \(bytes 131072 on\)"):
        verify_shard(SourceStore(tmp_path), 0)


def test_a_flipped_bit_in_the_index_is_found(tmp_path: Path) -> None:
    write_store(tmp_path, [text_document([5] * 10)] * 10)
    flip_bit(index_path(tmp_path, 0), -3)
    with pytest.raises(DataError, match=r"shard-000000.index is not the index that"):
        SourceStore(tmp_path).index(0)


@pytest.mark.parametrize("cut", [0, 5, 50, 500])
def test_a_cut_index_is_an_error(tmp_path: Path, cut: int) -> None:
    write_store(tmp_path, [text_document([5] * 10)] * 100)
    path = index_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"shard-000000.index is damaged"):
        SourceStore(tmp_path).index(0)


def test_token_files_of_another_size_and_missing_files(tmp_path: Path) -> None:
    write_store(tmp_path, [text_document([5] * 10)])
    tokens_path(tmp_path, 0).write_bytes(b"1234")
    with pytest.raises(DataError, match=r"shard-000000.tokens has 4 bytes and its index describes 20"):
        SourceStore(tmp_path).tokens(0)
    tokens_path(tmp_path, 0).unlink()
    with pytest.raises(DataError, match=r"tokens is missing"):
        SourceStore(tmp_path).tokens(0)
    index_path(tmp_path, 0).unlink()
    with pytest.raises(DataError, match=r"index is missing"):
        SourceStore(tmp_path).index(0)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="run `dsft prepare`"):
        SourceStore(tmp_path)


def test_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path, [text_document([5] * 10)])
    monkeypatch.setattr("dsft.store.reader.STORE_VERSION", 2)
    with pytest.raises(DataError, match=r"shard-000000.index is of store version 1 and this dsft reads version 2"):
        SourceStore(tmp_path).index(0)
    monkeypatch.setattr("dsft.store.manifest.STORE_VERSION", 2)
    with pytest.raises(DataError, match=r"manifest.json is of store version 1"):
        SourceStore(tmp_path)


def test_a_changed_manifest_is_damaged(tmp_path: Path) -> None:
    write_store(tmp_path, [text_document([5] * 10)])
    value = json.loads((tmp_path / "manifest.json").read_text())
    value["num_tokens"] = [11]
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match="its fingerprint is not"):
        read_manifest(tmp_path)


def test_nothing_is_visible_before_close_and_nothing_is_left_after_abort(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, token_dtype(1000), "raw")
    writer.add(text_document([1, 2, 3]))
    assert not tokens_path(tmp_path, 0).exists()
    assert not index_path(tmp_path, 0).exists()
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_a_new_version_of_a_shard_replaces_the_old_one(tmp_path: Path) -> None:
    write_store(tmp_path, [text_document([1])])
    writer = ShardWriter(tmp_path, 0, token_dtype(1000), "raw", "identity")
    writer.add(text_document([7, 8]))
    writer.close({"bad_records": 3})
    metadata = read_index_metadata(index_path(tmp_path, 0))
    assert (metadata["num_tokens"], metadata["raw_identity"], metadata["counts"]) == (2, "identity", {"bad_records": 3})
    with pytest.raises(DataError, match=r"is not the index that"):
        SourceStore(tmp_path).index(0)


def test_an_old_index_never_stands_beside_new_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path, [text_document([1])])

    def crash(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsft.store.writer.write_bytes", crash)
    writer = ShardWriter(tmp_path, 0, token_dtype(1000), "raw-0")
    writer.add(text_document([2]))
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert not index_path(tmp_path, 0).exists()


def test_publishing_again_leaves_the_shard_as_it_is(tmp_path: Path) -> None:
    write_store(tmp_path, [text_document([1])])
    before = {name: (tmp_path / name).stat().st_ino for name in os.listdir(tmp_path) if name.startswith("shard")}
    writer = ShardWriter(tmp_path, 0, token_dtype(1000), "raw-0")
    writer.add(text_document([1]))
    writer.close()
    assert {name: (tmp_path / name).stat().st_ino for name in before} == before
    assert not list(tmp_path.glob(".*"))


def test_an_id_that_does_not_fit_is_an_assertion(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, token_dtype(1000), "raw")
    with pytest.raises(AssertionError):
        writer.add(text_document([65_536]))
    writer.abort()


FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from dsft.errors import SaveError
from dsft.store.writer import ShardWriter
from tests.support.stores import text_document
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
writer = ShardWriter(Path(sys.argv[1]), 0, "<u2", "raw")
try:
    for _ in range(10):
        writer.add(text_document([5] * 50_000))
    writer.close()
except SaveError as error:
    print(error)
    print(os.listdir(sys.argv[1]))
"""


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=repository, capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert "shard-000000.tokens" in lines[0], done.stderr
    assert "Nothing half-written was left" in lines[0]
    assert lines[1] == "[]"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, token_dtype(1000), "raw")

    class FullFile:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer._file = FullFile()  # type: ignore[assignment]
    with pytest.raises(SaveError, match="no space left on that disk"):
        writer.add(text_document([1]))
    assert os.listdir(tmp_path) == []

"""The native row against the reference of dsft/batch/collate.py, on every field; what it refuses; damaged blocks."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.batch.collate import BatchSpec, collate, collate_rows
from dsft.batch.types import PackedBatch
from dsft.errors import DataError, KernelError
from dsft.ops import backend
from dsft.ops.buffers import BufferPool
from dsft.ops.native import load_cpu_library
from dsft.sampling.fim import FillInTheMiddle, FimOrder, fim_order
from dsft.sampling.packing import planned_lengths, split_documents
from dsft.sampling.types import Pieces
from dsft.store.layout import BLOCK_BYTES, tokens_path
from dsft.store.reader import SourceStore
from dsft.store.types import Document
from tests.support.stores import text_document, write_store

POOL = BufferPool()
FIM = FillInTheMiddle(0.7, 0.5, 901, 902, 903, num_leading=1, num_trailing=1)


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    backend.choose("native")
    yield
    backend.choose("native")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceStore, ...]:
    """Raw text (uint16), conversations (uint32), code for fill-in-the-middle (uint16)."""
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(5)
    texts = [text_document(rng.integers(0, 900, n)) for n in rng.integers(1, 90, 60)]
    chats = []
    for n in rng.integers(1, 120, 60):
        borders = np.sort(rng.choice(n + 1, min(int(n) // 2 * 2, 8), replace=False)).reshape(-1, 2).astype(np.int32)
        weights = rng.choice([0.3, 1.0, 2.7], len(borders)).astype(np.float32)
        chats.append(Document(rng.integers(0, 99_000, n).astype(np.int32), borders, weights, int(n)))
    return (
        write_store(folder / "text", texts, num_shards=4, name="text"),
        write_store(folder / "chat", chats, num_shards=3, name="chat", vocab_tokens=100_000),
        write_store(folder / "code", texts[::-1], num_shards=2, name="code"),
    )


def all_pieces(stores: tuple[SourceStore, ...], fim: tuple[FimOrder | None, ...], pack_tokens: int) -> Pieces:
    """Every piece of every document in epoch 1, source after source."""
    parts = []
    for source, store in enumerate(stores):
        for shard in range(store.num_shards):
            lengths, order = store.index(shard).lengths, fim[source]
            if order is not None:
                lengths = order.planned(1, shard, lengths)
            document, start, length = split_documents(planned_lengths(lengths, pack_tokens, "split"), pack_tokens)
            numbers = [np.full(len(document), number, np.int32) for number in (source, shard, 1)]
            parts.append(Pieces(numbers[0], numbers[1], document, start, length, numbers[2]))
    return Pieces(*(np.concatenate([getattr(part, name) for part in parts]) for name in Pieces.__slots__))


def assert_same(found: PackedBatch, expected: PackedBatch) -> None:
    """Equal fields bit by bit, dtypes included."""
    for entry in fields(PackedBatch):
        left, right = getattr(found, entry.name), getattr(expected, entry.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype, entry.name
            assert torch.equal(left, right), entry.name
        elif entry.name != "pieces":
            assert left == right, entry.name


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_equals_the_reference(stores: tuple[SourceStore, ...], data: st.DataObject) -> None:
    pack_tokens = data.draw(st.integers(1, 60))
    used = stores[: data.draw(st.integers(1, 3))]
    fim: tuple[FimOrder | None, ...] = (None, None, fim_order(FIM, 3, "code"))[: len(used)]
    spec = BatchSpec(
        used,
        data.draw(st.sampled_from([(1.0, 1.0, 1.0), (0.3, 1.7, 0.0)]))[: len(used)],
        data.draw(st.sampled_from(["token", "document", "message"])),
        pack_tokens,
        999,
        truncate_overlong=data.draw(st.booleans()),
        objectives=fim if any(fim) else (),
    )
    every = all_pieces(used, fim, pack_tokens)
    if spec.truncate_overlong:
        every = every.take(np.flatnonzero(every.start == 0))
    rows = data.draw(st.lists(st.integers(0, len(every.length) - 1), min_size=1, max_size=12))
    chosen = every.take(np.array(rows))
    middle = data.draw(st.integers(1, len(rows)))  # two rows, or one
    rows_of = []
    for row in (chosen.take(slice(0, middle)), chosen.take(slice(middle, None))):
        if len(row.length):
            num_packs = -(-int(row.length.sum()) // pack_tokens) + data.draw(st.integers(0, 2))
            border = data.draw(st.integers(0, len(row.length)))
            packs = [row.take(slice(0, border)), row.take(slice(border, None))] if num_packs > 1 else [row]
            rows_of.append([*packs, *[row.take(slice(0, 0))] * (num_packs - len(packs))])
    found = collate_rows(rows_of, spec, POOL)
    backend.choose("reference")
    expected = collate_rows(rows_of, spec)
    backend.choose("native")
    for left, right in zip(found, expected, strict=True):
        assert_same(left, right)


def one(store: SourceStore, *, document: int = 0, start: int = 0, length: int = 1, pack_tokens: int = 50) -> Any:
    """Spec and pack of one piece of the first shard."""
    columns = [np.array([number]) for number in (0, 0, document, start, length, 0)]
    kinds = (np.int32, np.int32, np.int64, np.int64, np.int32, np.int32)
    pieces = Pieces(*(column.astype(kind) for column, kind in zip(columns, kinds, strict=True)))
    return [pieces], BatchSpec((store,), (1.0,), "token", pack_tokens, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"document": 2}, "piece 0: its document is not in its shard"),
        ({"document": -1}, "piece 0: its document is not in its shard"),
        ({"length": 6}, "piece 0: it lies outside its document"),
        ({"start": 5}, "piece 0: it lies outside its document"),
        ({"start": -1}, "piece 0: it lies outside its document"),
        ({"length": 0}, "piece 0: it lies outside its document"),
        ({"length": 5, "pack_tokens": 4}, "piece 0: it does not fit into the row"),
    ],
)
def test_pieces_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    store = write_store(tmp_path, [text_document(range(5)), text_document(range(5))])
    with pytest.raises(KernelError, match=message):
        collate(*one(store, **changes))


def test_spans_that_do_not_ascend_are_refused(tmp_path: Path) -> None:
    """The writer refuses them; a row buffer would be too short for them."""
    document = Document(np.arange(9, dtype=np.int32), np.array([[1, 4], [5, 9]], np.int32), np.ones(2, np.float32), 9)
    store = write_store(tmp_path, [document])
    spans = np.array([[1, 9], [5, 9]], np.int32)
    store.views._mapped.add(0, replace(store.map_shard(0), index=replace(store.index(0), spans=spans)))
    with pytest.raises(KernelError, match="spans do not ascend"):
        collate(*one(store, length=9))


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_a_flipped_bit_is_found_when_its_block_is_first_read_and_not_before(
    tmp_path: Path, implementation: Any
) -> None:
    num_tokens = 3 * BLOCK_BYTES // 2
    store = write_store(tmp_path, [text_document([7] * (num_tokens // 4))] * 4)  # three blocks in four documents
    path = tokens_path(tmp_path, 0)
    data = bytearray(path.read_bytes())
    data[2 * BLOCK_BYTES + 5] ^= 4
    path.write_bytes(data)
    backend.choose(implementation)
    length = num_tokens // 4
    collate(*one(store, length=length, pack_tokens=length))
    with pytest.raises(DataError, match=r"shard-000000.tokens: block 2 \(bytes 131072 on\) has crc32"):
        collate(*one(store, document=2, length=length, pack_tokens=length))


def test_a_block_is_verified_once(tmp_path: Path) -> None:
    """What was found sound is not read again: a training step must not cost a whole block a document."""
    store = write_store(tmp_path, [text_document([7] * 9)])
    collate(*one(store))
    assert store.views._mapped.shards[0].block_is_verified.tolist() == [1]
    shard = store.views._mapped.shards[0]
    other = replace(shard.index, block_crc32=np.array([1], np.uint32))
    store.views._mapped.add(0, replace(shard, index=other))
    collate(*one(store))


def test_shards_beyond_the_limit_are_let_go_and_mapped_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsft.store.views.MAX_MAPPED_SHARDS", 2)
    store = write_store(tmp_path, [text_document([number]) for number in range(1, 6)], num_shards=5)
    mapped = []
    for _ in range(2):
        for shards in ([0, 1], [2, 3, 4], [1]):
            batch = collate(
                [
                    Pieces(
                        *(np.zeros(len(shards), np.int32), np.array(shards, np.int32), np.zeros(len(shards), np.int64)),
                        *(np.zeros(len(shards), np.int64), np.ones(len(shards), np.int32)),
                        np.zeros(len(shards), np.int32),
                    )
                ],
                BatchSpec((store,), (1.0,), "token", 4, 0),
            )
            mapped.append(sorted(store.views._mapped.shards))
            assert batch.input_ids[0, : len(shards)].tolist() == [shard + 1 for shard in shards]
    assert mapped == [[0, 1], [2, 3, 4], [1]] * 2


@pytest.mark.parametrize("name", ["dsft_crc32", "dsft_crc32_by_tables"])
def test_crc32_is_that_of_zlib(name: str) -> None:
    """With carry-less multiplication, and with the tables of a processor that has none."""
    function = getattr(load_cpu_library(), name)
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_uint32
    data = np.random.default_rng(0).bytes(70_001)
    for size in (*range(300), 4096, 65_535, 70_001):
        assert function(data[:size], size) == zlib.crc32(data[:size]), size

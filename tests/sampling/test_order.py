from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from dsft.errors import DataError
from dsft.sampling.order import CHUNK_DOCUMENTS, DocumentChunk, SourceOrder
from dsft.sampling.packing import Overlong
from dsft.sampling.types import PlannedSource

SHARD_DOCUMENTS = [5, 0, 7, 1, 9, 4, 3]


def make_order(
    shards: list[npt.NDArray[np.int32]] | None = None,
    *,
    name: str = "s",
    seed: int = 1,
    group_shards: int = 3,
    pack_tokens: int = 100,
    overlong: Overlong = "split",
) -> SourceOrder:
    if shards is None:
        shards = [np.arange(1, count + 1, dtype=np.int32) for count in SHARD_DOCUMENTS]
    source = PlannedSource(name, len(shards), lambda shard: shards[shard])
    return SourceOrder(source, seed=seed, group_shards=group_shards, pack_tokens=pack_tokens, overlong=overlong)


def read_epochs(order: SourceOrder, num_epochs: int) -> list[DocumentChunk]:
    chunks = []
    position = (0, 0, 0)
    while True:
        chunk = order.read(*position)
        if chunk.epoch >= num_epochs:
            return chunks
        chunks.append(chunk)
        position = (chunk.epoch, chunk.group, int(chunk.ordinal[-1]) + 1)


def documents(chunks: list[DocumentChunk]) -> list[tuple[int, int]]:
    return [pair for c in chunks for pair in zip(c.shard.tolist(), c.document.tolist(), strict=True)]


def test_an_epoch_has_every_document_once_with_its_length() -> None:
    chunks = read_epochs(make_order(), 2)
    everything = [(shard, number) for shard, count in enumerate(SHARD_DOCUMENTS) for number in range(count)]
    orders = [documents([c for c in chunks if c.epoch == epoch]) for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == everything
    assert orders[0] != orders[1]
    assert all(np.array_equal(c.length, c.document + 1) for c in chunks)


def test_documents_are_shuffled_across_the_shards_of_a_group_only() -> None:
    chunks = read_epochs(make_order(), 1)
    groups = [set(c.shard.tolist()) for c in chunks]
    assert [c.group for c in chunks] == [0, 1, 2]
    assert not groups[0] & groups[1]
    assert not groups[1] & groups[2]
    assert max(len(group) for group in groups) > 1
    interleaved = np.flatnonzero(np.diff(chunks[0].shard)).size
    assert interleaved > len(groups[0]) - 1


def test_the_order_is_decided_by_seed_name_and_epoch() -> None:
    first = documents(read_epochs(make_order(), 1))
    assert documents(read_epochs(make_order(), 1)) == first
    assert documents(read_epochs(make_order(seed=2), 1)) != first
    assert documents(read_epochs(make_order(name="t"), 1)) != first


def test_every_group_of_every_epoch_has_a_shuffle_of_its_own() -> None:
    chunks = read_epochs(make_order([np.ones(20, np.int32)] * 3, group_shards=1), 3)
    assert len({tuple(chunk.document.tolist()) for chunk in chunks}) == len(chunks) == 9


def test_any_position_gives_what_reading_through_gives() -> None:
    shards = [np.ones(CHUNK_DOCUMENTS, dtype=np.int32), np.ones(1500, dtype=np.int32)]
    through = documents(read_epochs(make_order(shards), 1))
    for ordinal in (0, 1, 777, CHUNK_DOCUMENTS - 1, CHUNK_DOCUMENTS, len(through) - 1):
        chunk = make_order(shards).read(0, 0, ordinal)
        assert documents([chunk]) == through[ordinal : ordinal + chunk.num_documents]
    assert make_order(shards).read(0, 0, len(through)).epoch == 1


def test_only_the_shards_of_the_group_are_asked_for() -> None:
    asked: list[int] = []

    def lengths(shard: int) -> npt.NDArray[np.int32]:
        asked.append(shard)
        return np.ones(10, dtype=np.int32)

    order = SourceOrder(PlannedSource("s", 100_000, lengths), seed=1, group_shards=4, pack_tokens=10, overlong="split")
    order.read(3, 20_000, 5)
    order.read(3, 20_000, 7)
    assert len(asked) == len(set(asked)) == 4


def test_dropped_documents_are_passed_over_and_counted_once() -> None:
    shards = [np.array([5, 200, 300, 7, 0], dtype=np.int32), np.array([400], dtype=np.int32)]
    chunks = read_epochs(make_order(shards, overlong="drop", group_shards=1), 3)
    assert sorted(int(n) for c in chunks for n in c.planned) == [5, 5, 5, 7, 7, 7]
    # What was dropped after the last kept document is counted with the next one, so read one more.
    more = make_order(shards, overlong="drop", group_shards=1).read(3, 0, 0)
    first = make_order(shards, overlong="drop", group_shards=1)
    position, dropped, tokens = (0, 0, 0), 0, 0
    while position[0] < 3:
        chunk = first.read(*position)
        position = (chunk.epoch, chunk.group, int(chunk.ordinal[-1]) + 1)
        if chunk.epoch < 3:
            dropped += int(chunk.dropped.sum())
            tokens += int(chunk.dropped_tokens.sum())
    final = int(chunk.dropped[0]) - int(more.dropped[0])  # those of epoch 2 that were read with epoch 3
    assert dropped + final == 3 * 4
    assert tokens + int(chunk.dropped_tokens[0]) - int(more.dropped_tokens[0]) == 3 * 900


@pytest.mark.parametrize("shards", [[], [np.empty(0, np.int32)] * 3, [np.zeros(4, np.int32)]])
def test_a_source_without_documents_is_an_error(shards: list[npt.NDArray[np.int32]]) -> None:
    with pytest.raises(DataError, match="'s'"):
        make_order(shards).read(0, 0, 0)


@pytest.mark.parametrize("position", [(0, 0, 0), (4, 1, 2)])
def test_packs_too_short_for_every_document_are_an_error(position: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match=r"pack_tokens = 2 .*overlong = drop"):
        make_order([np.full(30, 3, np.int32)] * 4, overlong="drop", pack_tokens=2).read(*position)


def test_documents_are_found_from_counts_alone() -> None:
    lengths = make_order()
    counts_only = SourceOrder(
        PlannedSource("s", len(SHARD_DOCUMENTS), lambda shard: pytest.fail("a length was read")),
        seed=1,
        group_shards=3,
        pack_tokens=100,
        overlong="split",
    )
    for chunk in read_epochs(lengths, 3):
        counts = np.array(SHARD_DOCUMENTS, dtype=np.int64)
        shard, document = counts_only.documents_at(chunk.epoch, chunk.group, chunk.ordinal, counts)
        assert np.array_equal(shard, chunk.shard)
        assert np.array_equal(document, chunk.document)

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.batch.collate import FILLER_TOKENS, BatchSpec, collate, filler
from dsft.batch.types import PackedBatch, model_inputs, row_sources
from dsft.ops import backend
from dsft.sampling.packing import concat_and_split, split_documents
from dsft.sampling.plan import plan_once
from dsft.sampling.types import Pieces
from dsft.store.reader import SourceStore
from dsft.store.types import Document
from tests.support.stores import text_document, write_store

PAD = 999


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    backend.choose("native")


def conversation(length: int, spans: list[tuple[int, int]], weights: list[float], first_id: int = 0) -> Document:
    ids = (np.arange(length, dtype=np.int32) + first_id) % 900
    return Document(ids, np.array(spans, np.int32).reshape(-1, 2), np.array(weights, np.float32), length)


def make_pieces(*rows: tuple[int, int, int, int, int]) -> Pieces:
    """One pack of (source, shard, document, start, length)."""
    source, shard, document, start, length = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return Pieces(
        source.astype(np.int32),
        shard.astype(np.int32),
        document,
        start,
        length.astype(np.int32),
        np.zeros(len(rows), np.int32),
    )


def make_spec(*stores: SourceStore, pack_tokens: int = 10, **changes: object) -> BatchSpec:
    spec = BatchSpec(stores, (1.0,) * len(stores), "token", pack_tokens, PAD)
    return replace(spec, **changes)  # type: ignore[arg-type]


def supervised(batch: PackedBatch) -> list[tuple[int, int, float]]:
    return list(zip(batch.rows.tolist(), batch.targets.tolist(), batch.row_weight.tolist(), strict=True))


def test_a_long_padding_tail_stays_within_the_positions_of_a_pack(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document([1, 2, 3]), text_document([4])])
    batch = collate([make_pieces((0, 0, 0, 0, 3)), make_pieces((0, 0, 1, 0, 1))], make_spec(store))
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, *range(10), *range(6)]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 20]


def test_a_row_by_hand(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document([1, 2, 3]), text_document([4]), text_document([5, 6, 7, 8])])
    batch = collate([make_pieces((0, 0, 2, 0, 4), (0, 0, 1, 0, 1), (0, 0, 0, 0, 3))], make_spec(store))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 4, 1, 2, 3, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8, 10]
    assert batch.max_seqlen == 4
    assert supervised(batch) == [(0, 6, 1.0), (1, 7, 1.0), (2, 8, 1.0), (5, 2, 1.0), (6, 3, 1.0)]
    assert (batch.num_tokens, batch.num_padding_tokens, batch.is_filler, batch.weight_sum) == (8, 2, False, 5.0)
    for name, dtype in {
        "input_ids": torch.int32,
        "position_ids": torch.int32,
        "cu_seqlens": torch.int32,
        "rows": torch.int32,
        "targets": torch.int32,
        "row_weight": torch.float32,
    }.items():
        assert getattr(batch, name).dtype == dtype, name


def test_a_full_row_has_no_tail(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document(range(10))])
    batch = collate([make_pieces((0, 0, 0, 0, 10))], make_spec(store))
    assert batch.cu_seqlens.tolist() == [0, 10]
    assert batch.num_padding_tokens == 0


def test_a_long_padding_tail_counts_for_the_longest_sequence(tmp_path: Path) -> None:
    """The attention kernels see the tail as a document, so max_seqlen must cover it."""
    store = write_store(tmp_path, [text_document([1, 2])])
    assert collate([make_pieces((0, 0, 0, 0, 2))], make_spec(store)).max_seqlen == 8


def test_labels_cross_the_cut_of_a_split_document(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document(range(100, 125))])
    spec = make_spec(store)
    first = collate([make_pieces((0, 0, 0, 0, 10))], spec)
    middle = collate([make_pieces((0, 0, 0, 10, 10))], spec)
    last = collate([make_pieces((0, 0, 0, 20, 5))], spec)
    assert first.targets.tolist() == list(range(101, 111))
    assert middle.targets.tolist() == list(range(111, 121))
    assert last.targets.tolist() == list(range(121, 125))
    assert first.rows.tolist() == list(range(10))
    assert middle.position_ids[0, 0] == 0


def test_several_packs_lie_one_after_the_other_and_padding_is_at_the_end(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document([1, 2, 3]), text_document([4, 5])])
    batch = collate([make_pieces((0, 0, 0, 0, 3)), make_pieces((0, 0, 1, 0, 2))], make_spec(store))
    assert batch.input_ids.shape == (1, 20)
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 20]


def test_spans_and_weights_of_conversations(tmp_path: Path) -> None:
    document = conversation(12, [(0, 2), (4, 7), (9, 12)], [0.5, 2.0, 1.0])
    store = write_store(tmp_path, [document])
    batch = collate([make_pieces((0, 0, 0, 0, 12))], make_spec(store, pack_tokens=12, loss_weights=(3.0,)))
    expected = {1: 1.5, 4: 6.0, 5: 6.0, 6: 6.0, 9: 3.0, 10: 3.0, 11: 3.0}  # target token -> weight; never token 0
    assert supervised(batch) == [(target - 1, target, weight) for target, weight in expected.items()]
    assert batch.weight_sum == sum(expected.values())


@pytest.mark.parametrize("reduction", ["token", "document"])
def test_every_target_of_a_cut_conversation_once_with_the_weight_of_the_whole(tmp_path: Path, reduction: str) -> None:
    rng = np.random.default_rng(0)
    borders = np.sort(rng.choice(np.arange(1, 97), 16, replace=False)).reshape(-1, 2)
    document = conversation(97, [tuple(pair) for pair in borders.tolist()], [1.0, 0.5] * 4)
    store = write_store(tmp_path, [text_document([1]), document])
    for pack_tokens in (7, 10, 97):
        spec = make_spec(store, pack_tokens=pack_tokens, loss_reduction=reduction)
        _, starts, lengths = split_documents(np.array([97], np.int32), pack_tokens)
        found: dict[int, float] = {}
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            batch = collate([make_pieces((0, 0, 1, start, length))], spec)
            for row, target, weight in supervised(batch):
                token = start + row + 1
                assert document.ids[token] == target
                assert token not in found
                found[token] = weight
        full = {
            token: weight
            for (begin, end), weight in zip(borders.tolist(), document.span_weights.tolist(), strict=True)
            for token in range(begin, end)
        }
        scale = len(full) if reduction == "document" else 1
        assert found == pytest.approx({token: weight / scale for token, weight in full.items()}, rel=1e-6)


def test_document_reduction_gives_each_text_document_weight_one(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document(range(n)) for n in (2, 5, 33, 1)])
    spec = make_spec(store, loss_reduction="document")
    packs = plan_once([store.index(0).lengths], 10)
    totals = np.zeros(4)
    for pack in packs:
        batch = collate([pack], spec)
        owner = torch.searchsorted(batch.cu_seqlens.long(), batch.rows, right=True) - 1
        np.add.at(totals, batch.pieces.document[owner.numpy()], batch.row_weight.numpy())
    assert totals.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])


def test_message_reduction_gives_each_message_its_weight_also_when_it_is_cut(tmp_path: Path) -> None:
    store = write_store(tmp_path, [conversation(25, [(0, 4), (6, 18), (20, 25)], [1.0, 0.5, 2.0])])
    spec = make_spec(store, loss_reduction="message")
    batches = [collate([make_pieces((0, 0, 0, start, length))], spec) for start, length in ((0, 10), (10, 10), (20, 5))]
    weights = torch.cat([batch.row_weight for batch in batches])
    assert [part.sum().item() for part in weights.split([3, 12, 5])] == pytest.approx([1.0, 0.5, 2.0])


def test_a_truncated_document_ends_at_the_cut(tmp_path: Path) -> None:
    store = write_store(tmp_path, [text_document(range(25))])
    pack = make_pieces((0, 0, 0, 0, 10))
    batch = collate([pack], make_spec(store, truncate_overlong=True, loss_reduction="document"))
    assert batch.rows.tolist() == list(range(9))
    assert batch.weight_sum == pytest.approx(1.0)


def test_a_source_without_loss_weight_has_no_rows(tmp_path: Path) -> None:
    stores = [write_store(tmp_path / str(n), [text_document(range(5))], name=str(n)) for n in range(3)]
    spec = make_spec(*stores, pack_tokens=15, loss_weights=(1.0, 0.0, 0.25))
    batch = collate([make_pieces((2, 0, 0, 0, 5), (1, 0, 0, 0, 5), (0, 0, 0, 0, 5))], spec)
    assert row_sources(batch, torch.device("cpu")).tolist() == [2] * 4 + [0] * 4
    assert batch.row_weight.tolist() == [0.25] * 4 + [1.0] * 4
    assert batch.num_tokens == 15


def test_a_row_without_any_supervision(tmp_path: Path) -> None:
    store = write_store(tmp_path, [conversation(6, [], []), text_document([3])])
    batch = collate([make_pieces((0, 0, 0, 0, 6), (0, 0, 1, 0, 1))], make_spec(store))
    assert batch.rows.numel() == batch.targets.numel() == batch.row_weight.numel() == 0
    assert row_sources(batch, torch.device("cpu")).tolist() == []
    assert batch.weight_sum == 0.0


def naive(pieces: Pieces, spec: BatchSpec) -> tuple[list[int], list[tuple[int, int, float]]]:
    """Ids of the row and its supervised rows, from each whole document's labels."""
    ids: list[int] = []
    rows = []
    columns = (pieces.source, pieces.shard, pieces.document, pieces.start, pieces.length)
    for source, shard, number, start, length in zip(*(column.tolist() for column in columns), strict=True):
        store = spec.stores[source]
        index = store.index(shard)
        first = int(index.token_offsets[number])
        document = store.tokens(shard)[first : first + int(index.lengths[number])].astype(int).tolist()
        weight, message = [0.0] * len(document), [-1] * len(document)
        for span in range(index.span_offsets[number], index.span_offsets[number + 1]):
            for token in range(max(1, index.spans[span][0]), index.spans[span][1]):
                weight[token] = float(index.span_weights[span]) * spec.loss_weights[source]
                message[token] = span
        for row in range(start, start + length):
            if row + 1 < len(document) and weight[row + 1] > 0:
                of_document = sum(w > 0 for w in weight)
                of_message = message.count(message[row + 1])
                count = {"token": 1, "document": of_document, "message": of_message}[spec.loss_reduction]
                rows.append((len(ids) + row - start, document[row + 1], np.float32(weight[row + 1] / count)))
        ids += document[start : start + length]
    return ids, rows


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceStore, SourceStore]:
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(3)
    texts = [text_document(rng.integers(0, 900, n)) for n in rng.integers(1, 60, 40)]
    chats = []
    for n in rng.integers(1, 80, 40):
        borders = np.sort(rng.choice(n + 1, min(int(n) // 2 * 2, 6), replace=False)).reshape(-1, 2)
        weights = rng.choice([0.5, 1.0, 2.0], len(borders)).tolist()
        chats.append(conversation(int(n), [tuple(pair) for pair in borders.tolist()], weights, int(n)))
    return (
        write_store(folder / "text", texts, num_shards=3, name="text"),
        write_store(folder / "chat", chats, num_shards=2, name="chat", vocab_tokens=100_000),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), reduction=st.sampled_from(["token", "document", "message"]), num_packs=st.integers(1, 3))
def test_equals_the_labels_of_whole_documents(
    two_stores: tuple[SourceStore, SourceStore], data: st.DataObject, reduction: str, num_packs: int
) -> None:
    pack_tokens = data.draw(st.integers(1, 50))
    spec = make_spec(*two_stores, pack_tokens=pack_tokens, loss_weights=(0.3, 1.7), loss_reduction=reduction)
    packs = []
    for source, store in enumerate(two_stores):
        lengths = [store.index(shard).lengths for shard in range(store.num_shards)]
        for pack in plan_once(lengths, pack_tokens):
            packs.append(replace(pack, source=np.full_like(pack.source, source)))
    chosen = data.draw(st.lists(st.sampled_from(range(len(packs))), min_size=num_packs, max_size=num_packs))
    batch = collate([packs[number] for number in chosen], spec)
    ids, rows = naive(batch.pieces, spec)
    assert batch.input_ids[0, : len(ids)].tolist() == ids
    assert (batch.input_ids[0, len(ids) :] == PAD).all()
    assert supervised(batch) == rows
    source_of = np.repeat(batch.pieces.source, batch.pieces.length)
    assert row_sources(batch, torch.device("cpu")).tolist() == source_of[[row for row, _, _ in rows]].tolist()
    assert batch.num_tokens == len(ids) == int(batch.cu_seqlens[len(batch.pieces.length)])
    assert batch.weight_sum == pytest.approx(sum(float(row[2]) for row in rows), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(pack_tokens=st.integers(1, 70), reduction=st.sampled_from(["token", "document", "message"]))
def test_documents_that_concat_and_split_cuts_anywhere(
    two_stores: tuple[SourceStore, SourceStore], pack_tokens: int, reduction: str
) -> None:
    """Every token of the shard once, each part its own document, and each label as in the whole document."""
    spec = make_spec(*two_stores, pack_tokens=pack_tokens, loss_weights=(0.3, 1.7), loss_reduction=reduction)
    seen = []
    document, start, length, packing = concat_and_split(two_stores[1].index(0).lengths, pack_tokens)
    for begin, end in pairwise(packing.offsets.tolist()):
        columns = (document[begin:end], start[begin:end], length[begin:end])
        pieces = make_pieces(*((1, 0, *piece) for piece in zip(*(c.tolist() for c in columns), strict=True)))
        batch = collate([pieces], spec)
        ids, rows = naive(pieces, spec)
        assert supervised(batch) == rows
        lengths = length[begin:end].tolist()
        padding = pack_tokens - sum(lengths)
        assert batch.cu_seqlens.diff().tolist() == lengths + [padding] * (padding > 0)
        assert batch.position_ids[0, : len(ids)].tolist() == [n for piece in lengths for n in range(piece)]
        seen += batch.input_ids[0, : batch.num_tokens].tolist()
    assert seen == two_stores[1].tokens(0).astype(int).tolist()


def test_the_hash_follows_the_bytes_and_not_the_place(two_stores: tuple[SourceStore, SourceStore]) -> None:
    spec = make_spec(*two_stores, pack_tokens=100)
    length = two_stores[0].index(0).lengths
    a, b = (0, 0, 0, 0, int(length[0])), (0, 0, 1, 0, int(length[1]))
    together = collate([make_pieces(a, b)], spec)
    apart = [collate([make_pieces(piece)], spec) for piece in (a, b)]
    assert together.data_hash == (apart[0].data_hash + apart[1].data_hash) % 2**63
    assert together.data_hash == collate([make_pieces(b), make_pieces(a)], spec).data_hash
    assert apart[0].data_hash != apart[1].data_hash
    assert 0 <= together.data_hash < 2**63


def test_the_hash_changes_with_one_token_and_with_the_document(tmp_path: Path) -> None:
    def hash_of(name: str, documents: list[list[int]], piece: tuple[int, int, int, int, int], vocab: int = 1000) -> int:
        store = write_store(tmp_path / name, [text_document(ids) for ids in documents], vocab_tokens=vocab)
        return collate([make_pieces(piece)], make_spec(store)).data_hash

    right = hash_of("right", [[1, 2, 3], [1, 2, 3]], (0, 0, 0, 0, 3))
    assert hash_of("wide", [[1, 2, 3], [1, 2, 3]], (0, 0, 0, 0, 3), vocab=70_000) == right  # uint32 in the store
    others = {
        hash_of("token", [[1, 2, 4]], (0, 0, 0, 0, 3)),
        hash_of("order", [[2, 1, 3]], (0, 0, 0, 0, 3)),
        hash_of("document", [[1, 2, 3], [1, 2, 3]], (0, 0, 1, 0, 3)),
        hash_of("start", [[9, 1, 2, 3]], (0, 0, 0, 1, 3)),
    }
    assert len(others | {right}) == 5


def test_a_filler_teaches_nothing() -> None:
    batch = filler(make_spec())
    assert batch.is_filler
    assert batch.input_ids.tolist() == [[PAD] * FILLER_TOKENS]
    assert batch.cu_seqlens.tolist() == [0, FILLER_TOKENS]
    assert (batch.num_tokens, batch.num_padding_tokens, batch.weight_sum, batch.data_hash) == (0, FILLER_TOKENS, 0.0, 0)
    assert batch.rows.numel() == len(batch.pieces.length) == 0


def test_fillers_and_batches_have_the_same_types(two_stores: tuple[SourceStore, SourceStore]) -> None:
    spec = make_spec(*two_stores)
    real = collate([make_pieces((0, 0, 0, 0, 1))], spec)
    for field in fields(PackedBatch):
        left, right = getattr(real, field.name), getattr(filler(spec), field.name)
        assert type(left) is type(right)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert left.dim() == right.dim()
    for name in Pieces.__slots__:
        assert getattr(real.pieces, name).dtype == getattr(filler(spec).pieces, name).dtype


def test_model_inputs_are_the_arguments_of_the_model(two_stores: tuple[SourceStore, SourceStore]) -> None:
    inputs = model_inputs(filler(make_spec(*two_stores)), torch.device("cpu"))
    assert set(inputs) == {
        "input_ids",
        "position_ids",
        "cu_seqlens",
        "max_seqlen",
        "rows",
        "targets",
        "row_weight",
        "num_tokens",
    }
    assert isinstance(inputs["max_seqlen"], int)

"""Tensors cut as ZeRO cuts them, written by n ranks, read in any ranges: the layout's formula, the shard files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dsft.checkpoint import shard
from dsft.checkpoint.layout import StoredTensor, shard_name
from dsft.checkpoint.manifest import MANIFEST_NAME, Manifest, manifest_to_json
from dsft.checkpoint.opened import BlockReader, OpenCheckpoint
from dsft.checkpoint.shard import Entry, ShardReader, Wanted, bytes_of, entry_name, write_shard
from dsft.errors import DamagedCheckpointError
from dsft.fsio import BLOCK_BYTES, write_json


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 150))
def test_slices_cover_a_tensor_once_and_writers_are_who_wrote(num: int, slice_elements: int, offset: int) -> None:
    tensor = StoredTensor("t", "trained", (num,), "float32", slice_elements, offset)
    num_ranks = (num + offset) // slice_elements + 2
    owners = [rank for rank in range(num_ranks) for _ in range(*tensor.slice_of(rank))]
    assert len(owners) == num
    assert [tensor.slice_of(rank)[0] for rank in owners] == sorted(tensor.slice_of(rank)[0] for rank in owners)
    for start in range(0, num, 7):
        for stop in range(start + 1, num + 1, 5):
            wrote = [rank for rank in tensor.writers_of(start, stop) if set(range(*tensor.slice_of(rank)))]
            assert sorted(set(owners[start:stop])) == wrote


def write_checkpoint(folder: Path, tensors: dict[StoredTensor, torch.Tensor], num_ranks: int) -> OpenCheckpoint:
    files = []
    for rank in range(num_ranks):
        parts = [(tensor, whole[slice(*tensor.slice_of(rank))]) for tensor, whole in tensors.items()]
        entries = [Entry(entry_name(tensor, "weight"), tensor.dtype, part.numel()) for tensor, part in parts]
        files.append(tuple(write_shard(folder, rank, entries, (bytes_of(part) for _, part in parts))))
    write_json(folder / MANIFEST_NAME, manifest_to_json(Manifest(1, "a", num_ranks, tuple(files))))
    return OpenCheckpoint(folder)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_any_cut_reads_back_at_any_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, num_writers: int, num_readers: int
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {}
    for number, dtype in enumerate(("int64", "float32", "bfloat16", "bool")):
        num = data.draw(st.integers(1, 40_000), label=dtype)
        tensor = StoredTensor(f"t{number}", "frozen", (num,), dtype, -(-num // num_writers), 0)
        tensors[tensor] = torch.arange(num).remainder(97).to(getattr(torch, dtype))
    checkpoint = write_checkpoint(folder, tensors, num_writers)
    for tensor, whole in tensors.items():
        got = torch.zeros_like(whole)
        part = -(-len(whole) // num_readers)
        for start in range(0, len(whole), part):
            stop = min(start + part, len(whole))
            for writer in tensor.writers_of(start, stop):
                begin, end = tensor.slice_of(writer)
                first, last = max(start, begin), min(stop, end)
                with ShardReader(checkpoint, writer) as reader:
                    reader.fill([Wanted(entry_name(tensor, "weight"), first - begin, got[first:last])])
        assert torch.equal(got, whole)
    ordinary = load_file(folder / shard_name(0))
    for tensor, whole in tensors.items():
        assert torch.equal(ordinary[entry_name(tensor, "weight")], whole[slice(*tensor.slice_of(0))])


def test_a_slice_that_is_not_there_is_named(tmp_path: Path) -> None:
    tensor = StoredTensor("t", "frozen", (10,), "float32", 10, 0)
    checkpoint = write_checkpoint(tmp_path, {tensor: torch.zeros(10)}, 1)
    with ShardReader(checkpoint, 0) as reader:
        for name, into in (
            ("u/weight", torch.zeros(1)),
            ("t/weight", torch.zeros(11)),
            ("t/weight", torch.zeros(1).long()),
        ):
            with pytest.raises(DamagedCheckpointError, match="does not hold"):
                reader.fill([Wanted(name, 0, into)])


def test_what_is_read_was_asked_for_before_and_not_too_far_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third element on, as at another world size: all of it is asked for, nothing else, a little ahead."""
    monkeypatch.setattr(shard, "AHEAD_BYTES", 4 << 20)
    tensors = {
        StoredTensor(name, "frozen", (900_000,), "float32", 900_000, 0): torch.rand(900_000) for name in "abcdef"
    }
    checkpoint = write_checkpoint(tmp_path, tensors, 1)
    wanted = [Wanted(f"{tensor.name}/weight", 300_000, torch.zeros(300_000)) for tensor in tensors]
    asked: set[int] = set()
    most_ahead = 0
    expect, pieces = BlockReader.expect, BlockReader.pieces

    def count(reader: BlockReader, offset: int, num_bytes: int) -> None:
        nonlocal most_ahead
        asked.update(range(offset // BLOCK_BYTES, -(-(offset + num_bytes) // BLOCK_BYTES)))
        most_ahead = max(most_ahead, len(asked - read))
        expect(reader, offset, num_bytes)

    def follow(reader: BlockReader, offset: int, num_bytes: int) -> Iterator[memoryview]:
        for piece in pieces(reader, offset, num_bytes):
            blocks = range(offset // BLOCK_BYTES, -(-(offset + len(piece)) // BLOCK_BYTES))
            assert asked.issuperset(blocks)
            read.update(blocks)
            offset += len(piece)
            yield piece

    read: set[int] = set()
    with ShardReader(checkpoint, 0) as reader:
        monkeypatch.setattr(BlockReader, "expect", count)
        monkeypatch.setattr(BlockReader, "pieces", follow)
        reader.fill(wanted)
    assert asked == read
    assert 4 << 20 <= most_ahead * BLOCK_BYTES <= (4 << 20) + shard._PART_BYTES + 8 * BLOCK_BYTES
    for one, whole in zip(wanted, tensors.values(), strict=True):
        assert torch.equal(one.into, whole[300_000:600_000])

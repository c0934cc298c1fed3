from __future__ import annotations

import gc

import torch

from dsft.ops.buffers import BufferPool


def test_memory_is_used_again_only_when_no_tensor_of_it_lives() -> None:
    pool = BufferPool()
    first = pool.take(100)
    part = first[10:20].view(2, 5)
    kept = first.data_ptr()
    first.fill_(7)
    del first
    second = pool.take(100)  # a part of the first is alive
    second.fill_(8)
    assert second.data_ptr() != kept
    assert part.tolist() == [[7] * 5] * 2
    del part
    gc.collect()
    assert pool.take(60).data_ptr() == kept


def test_larger_batches_get_larger_memory_and_few_buffers_are_remembered() -> None:
    pool = BufferPool()
    assert [len(pool.take(size)) for size in (5, 500, 5)] == [5, 500, 5]
    alive = [pool.take(8).fill_(number) for number in range(40)]
    assert [int(tensor[0]) for tensor in alive] == list(range(40))
    assert len(pool._buffers) == 16
    assert all(torch.equal(tensor, torch.full((8,), number, dtype=torch.int32)) for number, tensor in enumerate(alive))

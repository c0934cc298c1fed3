"""Pieces of mapped shards become packed rows, their supervised rows and their hashes, in one native call a step.

What it computes is specified by the reference in ``dsft/batch/collate.py``: both give the same bits. The call reads the
shards where they are mapped, and allocates nothing; the interpreter's lock is free meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dsft.errors import DataError, KernelError
from dsft.ops.buffers import BufferPool
from dsft.ops.native import load_cpu_library
from dsft.ops.reference import LossReduction

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

SHARD_VIEW = np.dtype(
    [
        *((name, np.uint64) for name in ("tokens", "token_offsets", "span_offsets", "spans", "span_weights")),
        *((name, np.uint64) for name in ("block_crc32", "block_is_verified")),
        *((name, np.int64) for name in ("num_documents", "token_bytes")),
    ]
)
"""Addresses of a shard's arrays, and their sizes: ``ShardView`` in csrc/cpu/gather_rows.cpp. Types: tokens uint16 or
uint32 (by token_bytes), block_is_verified uint8, the others as in ``dsft.store.types.ShardIndex``; no address of
block_crc32 (0): there is nothing to verify."""

_DAMAGED_BLOCK = 5
_ERRORS = {
    1: "its document is not in its shard",
    2: "it lies outside its document",
    3: "it does not fit into the row",
    4: "its document's supervised spans do not ascend",
    6: "a weight is negative or not finite",
}
_REDUCTIONS = {"token": 0, "document": 1, "message": 2}
_POINTER, _INT32, _INT64, _UINT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64


class GatheredRow(NamedTuple):
    """Tensors and numbers of ``dsft.batch.types.PackedBatch``; input_ids and position_ids are int32[1, L]."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    row_weight: torch.Tensor
    num_tokens: int
    max_seqlen: int
    data_hash: int
    weight_sum: float


class DocumentView(NamedTuple):
    """A ``SHARD_VIEW`` of one document, and the arrays it points to."""

    address: int
    arrays: tuple[npt.NDArray[Any], ...]


def document_view(ids: Int32, spans: Int32) -> DocumentView:
    """View of a document that is in no shard.

    Args:
        ids: int32[n], its tokens.
        spans: int32[K, 2], its supervised targets, ascending; their weight is 1.
    """
    ids, spans = np.ascontiguousarray(ids), np.ascontiguousarray(spans)
    arrays = (
        ids,
        np.array([0, len(ids)], dtype=np.int64),
        np.array([0, len(spans)], dtype=np.int64),
        spans,
        np.ones(len(spans), dtype=np.float32),
    )
    view = np.zeros(1, SHARD_VIEW)
    view[0] = (*(array.ctypes.data for array in arrays), 0, 0, 1, ids.itemsize)
    return DocumentView(view.ctypes.data, (view, *arrays))


SUMMARY = np.dtype(
    [*((name, np.int64) for name in ("num_rows", "num_tokens", "max_seqlen", "data_hash")), ("weight_sum", np.float64)]
)
"""``Summary`` in csrc/cpu/gather_rows.cpp."""


def gather_rows(
    views: UInt64,
    places: Int64,
    pieces: tuple[Int32, Int32, Int64, Int64, Int32],
    num_pieces: Sequence[int],
    row_tokens: Sequence[int],
    *,
    loss_weights: npt.NDArray[np.float64],
    reduction: LossReduction,
    most_document_tokens: int,
    pack_tokens: int,
    pad_id: int,
    hash_key: int,
    buffers: BufferPool | None = None,
) -> list[GatheredRow]:
    """Lay pieces side by side in rows, shift their labels, and hash what the rows hold.

    Args:
        views: uint64[S], address of the ``SHARD_VIEW`` each piece is read from; what it points to must live on.
        places: int64[S], number of each piece's document in its view.
        pieces: source int32[S], shard int32[S], document int64[S], start int64[S], length int32[S], row after row.
        num_pieces: of each row; row_tokens: length of each row, below 2^31.
        loss_weights: float64, factor of each source's rows.
        reduction: what the weight of a row is divided by, see ``dsft.ops.loss_mask.expand_loss_mask``.
        most_document_tokens: documents end after so many tokens.
        pack_tokens: positions in the padding tail of a row stay below it.
        pad_id: token of the padding tail.
        hash_key: 64-bit key of the data hash.
        buffers: where the memory comes from.

    Returns:
        The rows; their tensors share one buffer.

    Raises:
        KernelError: pieces that do not fit the shards or the row; names the piece.
        DataError: a block of tokens, read for the first time, has not the crc32 it was written with.
    """
    assert max(row_tokens) < 2**31, "cu_seqlens are int32"
    assert sum(num_pieces) == len(views)
    borders = np.cumsum([0, *num_pieces], dtype=np.int64)
    columns = [np.ascontiguousarray(column) for column in (views, places, *pieces)]
    lengths = np.array(row_tokens, dtype=np.int64)
    total = sum(row_tokens)
    memory = torch.empty(5 * total, dtype=torch.int32) if buffers is None else buffers.take(5 * total)
    buffer = memory.view(5, total)
    cu_seqlens = torch.empty(len(views) + 2 * len(row_tokens), dtype=torch.int32)
    summary, where = np.empty(len(row_tokens), SUMMARY), ctypes.c_int64()
    code = _function()(
        *(column.ctypes.data for column in columns),
        len(row_tokens),
        borders.ctypes.data,
        lengths.ctypes.data,
        loss_weights.ctypes.data,
        _REDUCTIONS[reduction],
        most_document_tokens,
        pack_tokens,
        pad_id,
        hash_key,
        *(memory.data_ptr() + 4 * total * column for column in range(5)),
        cu_seqlens.data_ptr(),
        summary.ctypes.data,
        ctypes.byref(where),
    )
    if code == _DAMAGED_BLOCK:
        raise DataError(f"piece {where.value} of a step lies in a block of tokens that is not as it was written.")
    if code:
        raise KernelError(f"gather_rows: piece {where.value}: {_ERRORS[code]}. The plan is not of these token stores.")
    return _cut(buffer, cu_seqlens, num_pieces, list(row_tokens), summary.tolist())


def _cut(
    buffer: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_pieces: Sequence[int],
    row_tokens: list[int],
    summary: list[Any],
) -> list[GatheredRow]:
    """The rows. One split a column: to slice row by row would cost more than to fill them."""
    ids, positions = (buffer[column : column + 1].split_with_sizes(row_tokens, dim=1) for column in (0, 1))
    used = [row[0] for row in summary]
    used.append(buffer.shape[1] - sum(used))
    rows, targets = (buffer[column].split_with_sizes(used) for column in (2, 3))
    weights = buffer[4].view(torch.float32).split_with_sizes(used)
    borders = [
        count + 1 + (row[1] < tokens) for count, tokens, row in zip(num_pieces, row_tokens, summary, strict=True)
    ]
    borders.append(len(cu_seqlens) - sum(borders))
    columns = zip(ids, positions, cu_seqlens.split_with_sizes(borders), rows, targets, weights, summary, strict=False)
    return [GatheredRow(*tensors, *numbers[1:]) for *tensors, numbers in columns]


@lru_cache(maxsize=1)
def _function() -> ctypes._NamedFuncPointer:
    function = load_cpu_library().dsft_gather_rows
    function.restype = _INT32
    function.argtypes = [
        *[_POINTER] * 7,
        _INT64,
        *[_POINTER] * 3,
        _INT32,
        *[_INT64] * 2,
        _INT32,
        _UINT64,
        *[_POINTER] * 8,
    ]
    return function

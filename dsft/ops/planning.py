"""The native parts of the plan: permutations, a source's order, the mixture's merge, packing.

Plain functions over numpy arrays. Their specification is the ``_reference`` functions in ``dsft/sampling``, which
choose between the two: both give the same result bit by bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from dsft.ops.native import load_cpu_library

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

DocumentColumns = tuple[Int64, Int32, Int64, Int32, Int32, Int64, Int64]
"""ordinal, shard, document, length, planned, dropped, dropped_tokens: as in ``dsft.sampling.order.DocumentChunk``."""

_OVERLONG = {"split": 0, "truncate": 1, "drop": 2}
_POINTER, _INT32, _INT64, _UINT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = load_cpu_library()
    permutation = [_UINT64, _UINT64, _POINTER]
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "dsft_permute": (None, [*permutation, _POINTER, _INT64, _POINTER]),
        "dsft_read_documents": (
            _INT64,
            [*permutation, _INT64, _INT64, *[_POINTER] * 3, _INT64, _INT32, _INT32, *[_POINTER] * 9],
        ),
        "dsft_merge_by_tag": (_INT64, [_INT64, *[_POINTER] * 4, _INT64, _INT64, _POINTER, _POINTER]),
        "dsft_best_fit_decreasing": (_INT64, [_POINTER, _INT64, _INT32, _POINTER, _POINTER]),
        "dsft_next_fit": (_INT64, [_POINTER, _INT64, _INT32, _POINTER]),
        "dsft_concat_and_split": (_INT64, [_POINTER, _INT64, _INT32, *[_POINTER] * 4]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def permute(size: int, base: int, round_keys: UInt64, positions: Int64) -> Int64:
    """Images of ``positions`` (int64[N], in ``[0, size)``) under the permutation (size, base, round_keys uint64[6])."""
    positions = np.ascontiguousarray(positions)
    permuted = np.empty_like(positions)
    _library().dsft_permute(
        size, base, round_keys.ctypes.data, positions.ctypes.data, positions.size, permuted.ctypes.data
    )
    return permuted


def read_documents(
    permutation: tuple[int, int, UInt64],
    begin: int,
    end: int,
    lengths: Int32,
    first_documents: Int64,
    shards: Int64,
    pack_tokens: int,
    overlong: Literal["split", "truncate", "drop"],
) -> tuple[DocumentColumns, int, int]:
    """The kept documents among ``[begin, end)`` of a shuffled group.

    Args:
        permutation: size, base and round keys of the group's permutation.
        lengths: int32[N], the group's documents, shard after shard.
        first_documents: int64[S], where each shard begins in ``lengths``; shards: int64[S], its number.

    Returns:
        The columns; documents and tokens dropped behind the last kept one.
    """
    lengths = np.ascontiguousarray(lengths)
    room = end - begin
    ordinal, document, dropped, dropped_tokens = (np.empty(room, dtype=np.int64) for _ in range(4))
    shard, length, planned = (np.empty(room, dtype=np.int32) for _ in range(3))
    columns = (ordinal, shard, document, length, planned, dropped, dropped_tokens)
    size, base, round_keys = permutation
    rest, rest_tokens = ctypes.c_int64(), ctypes.c_int64()
    kept = _library().dsft_read_documents(
        size,
        base,
        round_keys.ctypes.data,
        begin,
        end,
        lengths.ctypes.data,
        first_documents.ctypes.data,
        shards.ctypes.data,
        len(shards),
        pack_tokens,
        _OVERLONG[overlong],
        *(column.ctypes.data for column in columns),
        ctypes.byref(rest),
        ctypes.byref(rest_tokens),
    )
    ordinal, shard, document, length, planned, dropped, dropped_tokens = columns
    kept_columns = (
        ordinal[:kept],
        shard[:kept],
        document[:kept],
        length[:kept],
        planned[:kept],
        dropped[:kept],
        dropped_tokens[:kept],
    )
    return kept_columns, rest.value, rest_tokens.value


def merge_by_tag(
    planned: Sequence[Int32], drawn: Sequence[int], weights: Sequence[float], max_documents: int, max_tokens: int
) -> tuple[Int64, Int64]:
    """Merge the sources' documents by their tags. Arguments, result: ``merge_by_tag_reference`` in sampling/mixture."""
    columns = [np.ascontiguousarray(column) for column in planned]
    counts = np.array([len(column) for column in columns], dtype=np.int64)
    pointers = np.array([column.ctypes.data for column in columns], dtype=np.uintp)
    drawn_before = np.array(drawn, dtype=np.int64)
    divisors = np.array(weights, dtype=np.float64)
    room = min(max_documents, int(counts.sum()))
    owner, row = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    count = _library().dsft_merge_by_tag(
        len(columns),
        pointers.ctypes.data,
        counts.ctypes.data,
        drawn_before.ctypes.data,
        divisors.ctypes.data,
        room,
        max_tokens,
        owner.ctypes.data,
        row.ctypes.data,
    )
    return owner[:count], row[:count]


def best_fit_decreasing(lengths: Int32, pack_tokens: int) -> tuple[Int64, Int64]:
    """Pack pieces of ``lengths`` (int32[N], each in [1, pack_tokens], N < 2^31).

    Returns:
        pieces int64[N] (numbers, pack after pack), offsets int64[P + 1].
    """
    assert len(lengths) < 2**31, len(lengths)
    lengths = np.ascontiguousarray(lengths, dtype=np.int32)
    pieces = np.empty(len(lengths), dtype=np.int64)
    offsets = np.empty(len(lengths) + 1, dtype=np.int64)
    num_packs = _library().dsft_best_fit_decreasing(
        lengths.ctypes.data, len(lengths), pack_tokens, pieces.ctypes.data, offsets.ctypes.data
    )
    assert num_packs >= 0, f"piece {-1 - num_packs} has {lengths[-1 - num_packs]} tokens, not 1 to {pack_tokens}"
    return pieces, offsets[: num_packs + 1].copy()


def next_fit(lengths: Int32, pack_tokens: int) -> Int64:
    """Pack pieces of ``lengths`` (int32[N], each in [1, pack_tokens]) in their order; returns offsets int64[P + 1]."""
    lengths = np.ascontiguousarray(lengths, dtype=np.int32)
    offsets = np.empty(len(lengths) + 1, dtype=np.int64)
    num_packs = _library().dsft_next_fit(lengths.ctypes.data, len(lengths), pack_tokens, offsets.ctypes.data)
    assert num_packs >= 0, f"piece {-1 - num_packs} has {lengths[-1 - num_packs]} tokens, not 1 to {pack_tokens}"
    return offsets[: num_packs + 1].copy()


def concat_and_split(planned: Int32, pack_tokens: int) -> tuple[Int64, Int64, Int32, Int64]:
    """Cut documents (int32[N] tokens each, >= 1), one after the other, wherever a pack is full.

    Returns:
        Of each piece the document int64, its first token int64 and its length int32; offsets int64[P + 1].
    """
    planned = np.ascontiguousarray(planned, dtype=np.int32)
    most_packs = -(-int(planned.sum(dtype=np.int64)) // pack_tokens)
    document, start = (np.empty(len(planned) + most_packs, dtype=np.int64) for _ in range(2))
    length = np.empty(len(planned) + most_packs, dtype=np.int32)
    offsets = np.empty(most_packs + 1, dtype=np.int64)
    num_packs = _library().dsft_concat_and_split(
        planned.ctypes.data,
        len(planned),
        pack_tokens,
        *(column.ctypes.data for column in (document, start, length, offsets)),
    )
    assert num_packs == most_packs, f"document {-1 - num_packs} has no token"
    num_pieces = int(offsets[-1])
    return document[:num_pieces], start[:num_pieces], length[:num_pieces], offsets

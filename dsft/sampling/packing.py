"""From document lengths to packs: the overlong policy, pieces, and the packing of one window.

Best-fit-decreasing (Johnson, "Near-optimal bin packing algorithms", 1973): pieces in descending length, each into the
pack with the least free space that still holds it. For language-model data it fills 99.9 % and more. It sorts by
length, so the caller shuffles the packs.

Two others keep the order in which documents were drawn. Next-fit closes a pack where the next piece has no room.
Concat-and-split ("concatenate and chunk", as GPT-2 and most pre-training since) fills every pack to its last token and
cuts whatever document stands there; the parts stay apart in attention, as all pieces do, so a cut costs context.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dsft.ops import backend, planning

Overlong = Literal["split", "truncate", "drop"]
PackingMethod = Literal["best_fit_decreasing", "next_fit", "concat_and_split"]


@dataclass(frozen=True, slots=True)
class Packing:
    """Pieces in packs. ``pieces[offsets[p]:offsets[p + 1]]`` are the piece numbers of pack p.

    Attributes:
        pieces: int64, a permutation of the piece numbers. Best-fit-decreasing: longest first in a pack; else 0, 1, ...
        offsets: int64[P + 1].
    """

    pieces: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]


def planned_lengths(lengths: npt.NDArray[np.int32], pack_tokens: int, overlong: Overlong) -> npt.NDArray[np.int32]:
    """Tokens of each document that are trained under the overlong policy; 0: the document is not used."""
    if overlong == "split":
        return lengths
    if overlong == "truncate":
        return np.minimum(lengths, np.int32(pack_tokens))
    return np.where(lengths > pack_tokens, np.int32(0), lengths)


def split_documents(
    planned: npt.NDArray[np.int32], pack_tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Cut documents into pieces of at most ``pack_tokens``: full ones, then the rest.

    Args:
        planned: tokens per document, each >= 1.

    Returns:
        (document int64: row in ``planned``, start int64: first token, length int32) per piece, in document order.
    """
    if not planned.size or int(planned.max()) <= pack_tokens:
        return np.arange(len(planned), dtype=np.int64), np.zeros(len(planned), dtype=np.int64), planned
    counts = -(-planned.astype(np.int64) // pack_tokens)
    document = np.repeat(np.arange(len(planned), dtype=np.int64), counts)
    number = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * pack_tokens
    length = np.minimum(planned[document] - start, pack_tokens).astype(np.int32)
    return document, start, length


def pack_documents(
    planned: npt.NDArray[np.int32], pack_tokens: int, method: PackingMethod
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32], Packing]:
    """The pieces of documents (as :func:`split_documents` gives them) and their packs.

    Args:
        planned: tokens per document, each >= 1.
    """
    if method == "concat_and_split":
        return concat_and_split(planned, pack_tokens)
    document, start, length = split_documents(planned, pack_tokens)
    pack = next_fit if method == "next_fit" else best_fit_decreasing
    return document, start, length, pack(length, pack_tokens)


def best_fit_decreasing(lengths: npt.NDArray[np.int32], pack_tokens: int) -> Packing:
    """Pack pieces of ``lengths`` (each in [1, pack_tokens]).

    Ties: pieces of equal length in the order given; of packs with equal free space, the one that got to it last.
    Packs are numbered in the order they are opened.
    """
    if backend.current() == "native":
        return Packing(*planning.best_fit_decreasing(lengths, pack_tokens))
    return best_fit_decreasing_reference(lengths, pack_tokens)


def best_fit_decreasing_reference(lengths: npt.NDArray[np.int32], pack_tokens: int) -> Packing:
    """Arguments and result: :func:`best_fit_decreasing`.

    A run of pieces of one length is placed at once: the pack that
    took one stays the tightest fit until it is too full, so it takes as many as it can.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    values, run_starts = np.unique(-lengths[order].astype(np.int64), return_index=True)
    runs = np.diff(run_starts, append=len(order))
    packs: list[int] = []  # pack of each run segment, and how many pieces the segment has
    segments: list[int] = []
    spaces: list[int] = []  # distinct free spaces > 0, ascending
    stacks: dict[int, list[int]] = {}  # packs with that much free space
    num_packs = 0
    for negative, count in zip(values.tolist(), runs.tolist(), strict=True):
        length = -negative
        while count:
            at = bisect_left(spaces, length)
            if at < len(spaces):
                space = spaces[at]
                stack = stacks[space]
                pack = stack.pop()
                if not stack:
                    del spaces[at], stacks[space]
            else:
                pack, space = num_packs, pack_tokens
                num_packs += 1
            taken = min(count, space // length)
            packs.append(pack)
            segments.append(taken)
            count -= taken
            space -= taken * length
            if space:
                if space not in stacks:
                    stacks[space] = []
                    insort(spaces, space)
                stacks[space].append(pack)
    pack_of_piece = np.repeat(np.array(packs, dtype=np.int64), np.array(segments, dtype=np.int64))
    by_pack = np.argsort(pack_of_piece, kind="stable")
    offsets = np.zeros(num_packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of_piece, minlength=num_packs), out=offsets[1:])
    return Packing(order[by_pack], offsets)


def next_fit(lengths: npt.NDArray[np.int32], pack_tokens: int) -> Packing:
    """Pack pieces of ``lengths`` (each in [1, pack_tokens]) in the order given; a pack that is left is closed."""
    native = backend.current() == "native"
    offsets = planning.next_fit(lengths, pack_tokens) if native else next_fit_reference(lengths, pack_tokens)
    return Packing(np.arange(len(lengths), dtype=np.int64), offsets)


def next_fit_reference(lengths: npt.NDArray[np.int32], pack_tokens: int) -> npt.NDArray[np.int64]:
    """The offsets of :func:`next_fit`: each pack ends with the last piece whose end is within reach of its begin."""
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    offsets, begin_tokens = [0], 0
    while offsets[-1] < len(ends):
        offsets.append(bisect_right(ends, begin_tokens + pack_tokens, lo=offsets[-1]))
        begin_tokens = ends[offsets[-1] - 1]
    return np.array(offsets, dtype=np.int64)


def concat_and_split(
    planned: npt.NDArray[np.int32], pack_tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32], Packing]:
    """Lay documents (``planned`` tokens each, >= 1) one after the other and cut where a pack is full.

    Returns:
        Pieces as of :func:`split_documents`, and their packs. All packs but the last one are full.
    """
    native = backend.current() == "native"
    cut = planning.concat_and_split if native else concat_and_split_reference
    document, start, length, offsets = cut(planned, pack_tokens)
    return document, start, length, Packing(np.arange(len(document), dtype=np.int64), offsets)


def concat_and_split_reference(
    planned: npt.NDArray[np.int32], pack_tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """As ``dsft.ops.planning.concat_and_split``: a piece ends where a document or a pack does."""
    ends = np.cumsum(planned, dtype=np.int64)
    num_tokens = int(ends[-1]) if len(ends) else 0
    pack_begins = np.arange(0, num_tokens, pack_tokens, dtype=np.int64)
    begins = np.union1d(ends - planned, pack_begins)
    document = np.searchsorted(ends, begins, side="right")
    length = np.diff(begins, append=num_tokens).astype(np.int32)
    offsets = np.append(np.searchsorted(begins, pack_begins), len(begins))
    return document, begins - (ends - planned)[document], length, offsets


def reorder_packs(packing: Packing, positions: npt.NDArray[np.int64]) -> Packing:
    """The same packs in another order: pack ``positions[i]`` becomes pack ``i``."""
    sizes = np.diff(packing.offsets)[positions]
    offsets = np.zeros(len(positions) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    shift = np.repeat(packing.offsets[:-1][positions] - offsets[:-1], sizes)
    return Packing(packing.pieces[np.arange(len(packing.pieces), dtype=np.int64) + shift], offsets)

"""The hash of what a batch really holds: the proof, in the log, of what was trained."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from dsft.sampling.permutation import mix64, stream_key
from dsft.sampling.types import Pieces

HASH_KEY = stream_key(0, "data hash")
_KEY = np.uint64(HASH_KEY)
HASH_MASK = 2**63 - 1


def hash_row(pieces: Pieces, row: npt.NDArray[np.int32]) -> int:
    """63-bit hash of the pieces that lie side by side at the front of ``row``.

    The sum (mod 2^63) over pieces, so that the order of pieces and the rank that holds them do not matter.

    Args:
        row: int32[L], the token ids given to the model.
    """
    ids = row.astype("<i4").data
    ends = np.cumsum(pieces.length, dtype=np.int64).tolist()
    crcs = []
    begin = 0
    for end in ends:
        crcs.append(zlib.crc32(ids[begin:end]))
        begin = end
    hashes: list[int] = piece_hashes(pieces, np.array(crcs, dtype=np.uint64)).tolist()
    return sum(hashes) & HASH_MASK


def piece_hashes(pieces: Pieces, crc32: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash of each piece (uint64[S]): its source, shard, document, start, and its tokens.

    Args:
        crc32: of each piece's tokens as little-endian int32.
    """
    state = np.full(len(pieces.length), _KEY)
    for column in (pieces.source, pieces.shard, pieces.document, pieces.start, crc32):
        state = mix64(state ^ mix64(column.astype(np.uint64) + _KEY))
    return state

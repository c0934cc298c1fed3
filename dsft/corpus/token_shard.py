"""Indexes a token file of another program: its documents' lengths and the hashes of its blocks; tokens stay there."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsft.corpus.listing import RawShard
from dsft.corpus.shard import ShardProgress
from dsft.corpus.token_files import TokenFile, read_token_file
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DamagedFileError, DataError
from dsft.store.in_place import publish_in_place
from dsft.store.layout import BLOCK_BYTES, token_dtype

_CHUNK_BLOCKS = 256


def index_token_shard(
    folder: Path,
    number: int,
    raw: RawShard,
    tokenizer: Tokenizer,
    report: Callable[[ShardProgress], None],
    say: Callable[[str], None],
) -> None:
    """Read every token of a file once, and publish it as shard ``number`` of a store.

    Empty documents are left out and counted. The index notes how many documents begin and end as the tokenizer's own
    do (``num_with_prefix``, ``num_with_suffix``).

    Raises:
        DataError: a token that the tokenizer does not have, a document too long; DamagedFileError: a file that is not
            what its index describes. SaveError: the store cannot be written.
    """
    file = read_token_file(raw)
    lengths = np.diff(file.ends, prepend=np.int64(0))
    num_empty = int((lengths == 0).sum())
    lengths = lengths[lengths > 0]
    if len(lengths) == 0:
        file = TokenFile(file.path, token_dtype(tokenizer.vocab_tokens), file.ends)
    elif int(lengths.max()) > np.iinfo(np.int32).max:
        raise DataError(f"{file.path}: a document has {int(lengths.max()):,} tokens; at most 2^31 - 1 can be read.")

    def read(num_tokens: int, num_bytes: int) -> None:
        report(ShardProgress(int(np.searchsorted(file.ends, num_tokens, "right")), num_tokens, 0, num_bytes))

    crc32 = _check_tokens(file, tokenizer.vocab_tokens, read)
    prefix, suffix = _num_with_affixes(file, lengths, tokenizer)
    report(ShardProgress(len(lengths), int(lengths.sum()), 0, raw.num_bytes))
    for affix, ids, count in (("begin", tokenizer.prefix_ids, prefix), ("end", tokenizer.suffix_ids, suffix)):
        if ids and count < len(lengths):
            say(
                f"{file.path}: {len(lengths) - count:,} of {len(lengths):,} documents do not {affix} with the token "
                f"{', '.join(map(str, ids))}, as this tokenizer's documents do; they are learned as they are"
            )
    publish_in_place(
        folder,
        number,
        file.path,
        file.dtype,
        lengths.astype(np.int32),
        crc32,
        {
            "raw_name": raw.name,
            "raw_identity": raw.identity,
            "counts": {"without_tokens": num_empty} if num_empty else {},
            "num_with_prefix": prefix,
            "num_with_suffix": suffix,
        },
    )


def _check_tokens(file: TokenFile, vocab_tokens: int, read: Callable[[int, int], None]) -> npt.NDArray[np.uint32]:
    """The crc32 of each block, after a look at every token."""
    crc32: list[int] = []
    num_tokens = 0
    try:
        with open(file.path, "rb") as opened:
            while chunk := opened.read(_CHUNK_BLOCKS * BLOCK_BYTES):
                tokens = np.frombuffer(chunk, file.dtype, len(chunk) // file.dtype.itemsize)
                unknown = np.flatnonzero(tokens >= vocab_tokens)
                if len(unknown):
                    at = num_tokens + int(unknown[0])
                    document = int(np.searchsorted(file.ends, at, "right"))
                    raise DataError(
                        f"{file.path}: token {at} (in document {document}) is {int(tokens[unknown[0]])}, and the "
                        f"tokenizer has {vocab_tokens} tokens: the corpus was made with another tokenizer. Set "
                        "model.tokenizer to that one."
                    )
                crc32 += (zlib.crc32(chunk[at : at + BLOCK_BYTES]) for at in range(0, len(chunk), BLOCK_BYTES))
                num_tokens += len(tokens)
                read(num_tokens, num_tokens * file.dtype.itemsize)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror or error}.") from error
    if num_tokens != (int(file.ends[-1]) if len(file.ends) else 0):
        raise DamagedFileError(f"{file.path} was changed while it was read; prepare it when nobody writes it.")
    return np.array(crc32, np.uint32)


def _num_with_affixes(file: TokenFile, lengths: npt.NDArray[np.int64], tokenizer: Tokenizer) -> tuple[int, int]:
    """How many documents begin with the tokenizer's prefix, and how many end with its suffix."""
    if len(lengths) == 0:
        return 0, 0
    tokens = np.memmap(file.path, file.dtype, mode="r")
    ends = np.cumsum(lengths)
    begins = np.ones(len(lengths), np.bool_)
    for place, token in enumerate(tokenizer.prefix_ids):
        begins &= (lengths > place) & (tokens[np.minimum(ends - lengths + place, len(tokens) - 1)] == token)
    finishes = np.ones(len(lengths), np.bool_)
    for place, token in enumerate(reversed(tokenizer.suffix_ids)):
        finishes &= (lengths > place) & (tokens[np.maximum(ends - 1 - place, 0)] == token)
    return int(begins.sum()), int(finishes.sum())

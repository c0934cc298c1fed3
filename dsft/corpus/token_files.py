"""Corpora that were tokenised elsewhere: Megatron's ``.bin`` and ``.idx``, datatrove's ``.ds`` and ``.ds.index``.

Both token files are the documents one after the other and nothing else, which is what a shard of a token store is, so
they are used where they lie. What is read here is where their documents end. Layouts: ``_IndexReader`` in
megatron/core/datasets/indexed_dataset.py, ``TokenizedFile`` in datatrove/pipeline/tokens/tokenizer.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsft.config.remote_path import is_remote
from dsft.corpus.listing import RawShard, describe_file, join_files, list_shards
from dsft.corpus.raw_file import RawFile
from dsft.errors import DamagedFileError, DataError

SUFFIXES = (".bin", ".ds")
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34  # magic 9, version 8, dtype code 1, number of sequences 8, number of documents 8
_MEGATRON_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_OTHER_MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "float64", 7: "float32"}


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A token file of another program.

    Attributes:
        path: the tokens; document by document, no header.
        dtype: of a token: little-endian uint16 or uint32 (Megatron's int32 is read as uint32).
        ends: int64[N], where each document ends, in tokens; not descending.
    """

    path: Path
    dtype: np.dtype[np.unsignedinteger[npt.NBitBase]]
    ends: npt.NDArray[np.int64]


def list_token_shards(source_name: str, path: str | Sequence[str]) -> list[RawShard]:
    """The token files of a source as raw shards, each with its index as the second file.

    Raises:
        DataError: as ``list_shards``; a file without its index, with a loss mask, or at a URL.
    """
    for entry in [path] if isinstance(path, str) else path:
        if is_remote(entry):
            raise DataError(
                f"data source {source_name!r}: {entry} is a URL, and tokens are used where they lie, in a folder that "
                "every host sees. Copy the files there."
            )
    return [_with_index(shard.files[0]) for shard in list_shards(source_name, path, SUFFIXES)]


def read_token_file(raw: RawShard) -> TokenFile:
    """Where the documents of a token file end.

    Raises:
        DamagedFileError: its index is not one, is cut short, or describes other tokens than the file holds.
        DataError: tokens of a type that dsft does not train on.
    """
    tokens, index = raw.files
    try:
        data = Path(index.path).read_bytes()
        num_bytes = os.stat(tokens.path).st_size
        if tokens.name.endswith(".bin"):
            return _megatron(tokens, index, data, num_bytes)
        return _datatrove(tokens, index, data, num_bytes)
    except OSError as error:
        raise DataError(f"{tokens} with {index} cannot be read: {error.strerror or error}.") from error


def _with_index(tokens: RawFile) -> RawShard:
    if tokens.name.endswith(".bin"):
        path = Path(tokens.path).with_suffix(".idx")
    else:
        path = Path(f"{tokens.path}.index")
        if Path(f"{tokens.path}.loss").exists():
            raise DataError(
                f"{tokens}.loss masks tokens of {tokens}, and format tokens learns every token. Train on the text that "
                "it was made of, or remove the mask if all of it is to be learned."
            )
    if not path.is_file():
        raise DataError(f"{tokens} holds tokens, and {path}, which says where its documents end, is not there.")
    return join_files([tokens, describe_file(path, Path(tokens.path).parent)])


def _megatron(tokens: RawFile, index: RawFile, data: bytes, num_bytes: int) -> TokenFile:
    if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEADER_BYTES:
        raise _damaged(index, "it is no Megatron index: it does not begin with MMIDIDX and a header")
    version, code = int.from_bytes(data[9:17], "little"), data[17]
    num_sequences, num_borders = np.frombuffer(data, "<u8", 2, 18).tolist()
    if version != 1:
        raise _damaged(index, f"it is of version {version}, and version 1 is known")
    if code not in _MEGATRON_DTYPES:
        kind = _OTHER_MEGATRON_DTYPES.get(code, "none that Megatron has")
        raise DataError(f"{index}: its tokens are of type {code} ({kind}); dsft trains on uint16 (8) and int32 (4).")
    arrays_bytes = 12 * num_sequences + 8 * num_borders
    rest = len(data) - _HEADER_BYTES - arrays_bytes
    if num_sequences and rest == num_sequences:
        raise DataError(f"{index} is of a multimodal corpus (it has a mode for each sequence); dsft trains on text.")
    if rest:
        raise _damaged(index, f"it has {len(data)} bytes instead of {len(data) - rest}")
    dtype = _MEGATRON_DTYPES[code]
    lengths = np.frombuffer(data, "<i4", num_sequences, _HEADER_BYTES).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", num_sequences, _HEADER_BYTES + 4 * num_sequences)
    borders = np.frombuffer(data, "<i8", num_borders, _HEADER_BYTES + 12 * num_sequences)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    if (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise _damaged(index, "its sequences do not lie one after the other")
    is_whole = num_borders > 0 and borders[0] == 0 and borders[-1] == num_sequences and (np.diff(borders) >= 0).all()
    if not is_whole:
        raise _damaged(index, "its documents do not divide its sequences")
    _check_size(tokens, index, int(ends[-1]) * dtype.itemsize, num_bytes)
    return TokenFile(Path(tokens.path), np.dtype(f"<u{dtype.itemsize}"), ends[borders[1:]])


def _datatrove(tokens: RawFile, index: RawFile, data: bytes, num_bytes: int) -> TokenFile:
    if len(data) % 8:
        raise _damaged(index, f"it has {len(data)} bytes, and 8 belong to each document")
    ends = np.frombuffer(data, "<u8").astype(np.int64)
    if (np.diff(ends, prepend=np.int64(0)) < 0).any():
        raise _damaged(index, "its documents do not end one after the other")
    num_tokens = int(ends[-1]) if len(ends) else 0
    token_bytes = _datatrove_token_bytes(tokens)
    if token_bytes is None:  # written without the file that says it: the size tells
        token_bytes = 4 if num_bytes == 4 * num_tokens else 2
    _check_size(tokens, index, num_tokens * token_bytes, num_bytes)
    return TokenFile(Path(tokens.path), np.dtype(f"<u{token_bytes}"), ends)


def _datatrove_token_bytes(tokens: RawFile) -> int | None:
    """What the file beside it says: ``tokenizer|bytes of a token``, its number of tokens, and that in words."""
    path = Path(f"{tokens.path}.metadata")
    if not path.exists():
        return None
    said = path.read_text(errors="replace").partition("\n")[0].rpartition("|")[2]
    if said not in ("2", "4"):
        raise DataError(f"{path}: its first line should end with |2 or |4, the bytes of a token, not with {said!r}.")
    return int(said)


def _check_size(tokens: RawFile, index: RawFile, described_bytes: int, num_bytes: int) -> None:
    if described_bytes > num_bytes:
        raise _damaged(tokens, f"it has {num_bytes} bytes and {index} points up to byte {described_bytes}: it was cut")
    if described_bytes < num_bytes:
        raise _damaged(tokens, f"it has {num_bytes} bytes and {index} describes the first {described_bytes} only")


def _damaged(file: RawFile, reason: str) -> DamagedFileError:
    return DamagedFileError(f"{file} cannot be used: {reason}. Copy the corpus again, the tokens with their index.")

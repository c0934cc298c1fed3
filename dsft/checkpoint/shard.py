"""One rank's slices as an ordinary safetensors file, written from the live tensors and read in ranges.

Each tensor in it is flat and is named ``<parameter>/<key>``: any safetensors reader can look into a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dsft.checkpoint.layout import StoredTensor, blocks_name, shard_name
from dsft.checkpoint.manifest import WrittenFile
from dsft.checkpoint.opened import BlockReader, OpenCheckpoint
from dsft.errors import DamagedCheckpointError
from dsft.fsio import BlockHashedFile, hash_file, write_bytes

if TYPE_CHECKING:
    import torch

AHEAD_BYTES = 32 << 20
"""The kernel is asked to fetch so much before it is read, into its page cache."""
_PART_BYTES = 1 << 20
"""Asked for at a time: Linux cuts a request to what the disk or server takes at once (usually 1 MiB or more)."""

_SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A slice in a shard: its name, torch's name of its type, and how many elements it has."""

    name: str
    dtype: str
    num_elements: int


def entry_name(tensor: StoredTensor, key: str) -> str:
    """Name of a slice in a shard."""
    return f"{tensor.name}/{key}"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor on the CPU (a copy of it where it is not contiguous)."""
    import torch

    view: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def write_shard(folder: Path, rank: int, entries: Sequence[Entry], contents: Iterable[memoryview]) -> list[WrittenFile]:
    """Write one rank's slices into ``folder``, and the hashes of the file's blocks beside it.

    Args:
        entries: what the file will hold; larger types first, so that every slice is aligned.
        contents: their bytes, one after the other, in any parts; each is written before the next is asked for.

    Raises:
        OSError: the file system failed.
    """
    (folder / shard_name(rank)).parent.mkdir(exist_ok=True)
    path = (folder / shard_name(rank)).resolve()  # it may lie on a disk of this host
    with BlockHashedFile(path) as file:
        header = _header(entries)
        file.write(header)
        for part in contents:
            file.write(part)
        due_bytes = sum(entry.num_elements * _element_bytes(entry.dtype) for entry in entries)
        assert file.num_bytes == len(header) + due_bytes, (file.num_bytes, len(header), due_bytes)
    write_bytes(folder / blocks_name(rank), bytes(file.hashes))
    hashes = WrittenFile(blocks_name(rank), *hash_file(folder / blocks_name(rank)))
    return [WrittenFile(shard_name(rank), file.num_bytes, "", blocks_name(rank)), hashes]


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.num_elements * _element_bytes(entry.dtype)
        kind = _SAFETENSORS_NAMES[entry.dtype]
        header[entry.name] = {"dtype": kind, "shape": [entry.num_elements], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _element_bytes(dtype: str) -> int:
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize


@dataclass(frozen=True, slots=True)
class Wanted:
    """Elements to read from a shard: ``[first, first + into.numel())`` of a slice; ``into`` is flat."""

    name: str
    first: int
    into: torch.Tensor


class _Ahead:
    """Lets the kernel fetch what will be read next while what was read is checked and copied.

    At another world size a rank reads a part of each tensor: ranges too short and too far apart for the kernel's own
    read-ahead, which waits for bytes that follow each other.
    """

    def __init__(self, reader: BlockReader, ranges: Sequence[tuple[int, int]]) -> None:
        """Args: ``ranges``: (offset, length) in bytes, in the order in which they will be read."""
        self._reader = reader
        self._parts = (
            (offset + at, min(_PART_BYTES, num_bytes - at))
            for offset, num_bytes in ranges
            for at in range(0, num_bytes, _PART_BYTES)
        )
        self._due_bytes = 0
        self.move(AHEAD_BYTES)

    def move(self, num_bytes: int) -> None:
        """So many more bytes have been read."""
        self._due_bytes += num_bytes
        while self._due_bytes > 0 and (part := next(self._parts, None)) is not None:
            self._reader.expect(*part)
            self._due_bytes -= part[1]


class ShardReader:
    """One rank's shard, open; its header is read and checked."""

    def __init__(self, checkpoint: OpenCheckpoint, rank: int) -> None:
        """Raises DamagedCheckpointError when the file is not what was written."""
        self._path = checkpoint.folder / shard_name(rank)
        self._reader = checkpoint.open_blocks(shard_name(rank))
        try:
            header_bytes = int.from_bytes(self._bytes(0, 8), "little")
            self._header = json.loads(self._bytes(8, header_bytes))
        except BaseException:
            self._reader.__exit__(None, None, None)
            raise
        self._data_start = 8 + header_bytes

    def fill(self, wanted: Iterable[Wanted]) -> None:
        """Read all that is wanted, in the order of the file, into where it is wanted.

        Raises:
            DamagedCheckpointError: a block is not what was written, or a slice is not there or of another type.
        """
        ranges = sorted(((self._position(one), one) for one in wanted), key=lambda item: item[0])
        ahead = _Ahead(self._reader, [(position, one.into.numel() * one.into.itemsize) for position, one in ranges])
        for position, one in ranges:
            self._fill_one(position, one.into, ahead)

    def _position(self, one: Wanted) -> int:
        entry = self._header.get(one.name)
        num_elements = 0 if entry is None else entry["shape"][0]
        kind = _SAFETENSORS_NAMES[str(one.into.dtype).removeprefix("torch.")]
        if entry is None or entry["dtype"] != kind or one.first + one.into.numel() > num_elements:
            raise DamagedCheckpointError(
                f"{self._path} does not hold {one.name} as its layout says (elements {one.first:,} to "
                f"{one.first + one.into.numel():,} in {kind})."
            )
        begin: int = entry["data_offsets"][0]
        return self._data_start + begin + one.first * one.into.itemsize

    def _fill_one(self, position: int, into: torch.Tensor, ahead: _Ahead) -> None:
        import torch

        done = 0
        for piece in self._reader.pieces(position, into.numel() * into.itemsize):
            ahead.move(len(piece))
            elements = torch.frombuffer(piece, dtype=into.dtype)
            into[done : done + len(elements)].copy_(elements)
            done += len(elements)

    def _bytes(self, offset: int, num_bytes: int) -> bytes:
        return b"".join(bytes(piece) for piece in self._reader.pieces(offset, num_bytes))

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, trace)

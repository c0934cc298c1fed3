"""Reads raw shards as streams of records. Damage to a file is an error; a bad record is reported to the caller."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from dsft.corpus.fields import kind
from dsft.corpus.hub import read_dataset_shard
from dsft.corpus.listing import RawShard
from dsft.corpus.raw_file import RawFile
from dsft.corpus.samples import BadRecord
from dsft.errors import DamagedFileError, DataError
from dsft.remote import check_unchanged

_CHUNK_BYTES = 1 << 20
_COMPRESSED_CHUNK_BYTES = 1 << 17
"""Smaller, because text may come out a hundred times as long."""
_ROWS = 256
"""Table rows that are turned into Python objects at a time."""

_MOST_ARRAY_BYTES = 1 << 30
"""A JSON array is read whole, and takes some ten times its size in memory."""

_ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it is.

    Attributes:
        file: the raw file.
        place: where in the file, such as ``line 12``; empty for a .txt file.
        value: what was read, or why it could not be.
        read_bytes: bytes of the raw file read so far (of its compressed form).
    """

    file: RawFile
    place: str
    value: Any | BadRecord
    read_bytes: int

    @property
    def location(self) -> str:
        """``file:12``, as editors understand it."""
        return f"{self.file}:{self.place}" if self.place else str(self.file)


def read_records(shard: RawShard, columns: list[str] | None = None) -> Iterator[Record]:
    """Stream the records of a raw shard, in order.

    Args:
        shard: from ``list_shards``.
        columns: read only these columns of tables that have them; None reads all.

    Raises:
        DataError: a file is missing, or cannot be reached.
        DamagedFileError: a file is cut short or damaged, or was changed while it was read; names it and the place.
    """
    for file in shard.files:
        try:
            yield from _reader(file)(file, columns)
            if file.is_remote and not file.is_hub_shard:  # that one is of a commit
                check_unchanged(file.path, file.num_bytes, file.version)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error


def _reader(file: RawFile) -> Callable[[RawFile, list[str] | None], Iterator[Record]]:
    if file.is_hub_shard:
        return _read_hub
    readers = {
        ".jsonl": _read_jsonl,
        ".jsonl.gz": _read_jsonl,
        ".jsonl.zst": _read_jsonl,
        ".json": _read_array,
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
        ".txt": _read_text,
    }
    return next(reader for suffix, reader in readers.items() if file.name.endswith(suffix))


def _read_text(file: RawFile, columns: list[str] | None) -> Iterator[Record]:
    with file.open() as raw:
        data = raw.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        value: Any = BadRecord(_decode_problem(error, data))
    else:
        # One column, whatever its name is in the configuration.
        value = {name: text for name in columns or ["text"]}
    yield Record(file, "", value, len(data))


def _read_jsonl(file: RawFile, columns: list[str] | None) -> Iterator[Record]:
    with file.open() as raw:
        for number, line in enumerate(_lines(_chunks(file, raw)), start=1):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if line.strip():
                yield Record(file, str(number), _parse_json(line), raw.tell())


def _read_array(file: RawFile, columns: list[str] | None) -> Iterator[Record]:
    stem = file.name.removesuffix(".json")
    if file.num_bytes > _MOST_ARRAY_BYTES:
        raise DataError(
            f"{file} has {file.num_bytes:,} bytes; a .json file is read whole, so at most {_MOST_ARRAY_BYTES:,}. Write "
            f"it as one record a line: jq -c '.[]' {stem}.json > {stem}.jsonl"
        )
    with file.open() as raw:
        values = _parse_json(raw.read().removeprefix(b"\xef\xbb\xbf"))
    if not isinstance(values, list):
        problem = values if isinstance(values, BadRecord) else f"it is {kind(values)}"
        raise DamagedFileError(
            f"{file} is not one JSON array of records: {problem}. Name a file with one record a line .jsonl; take the "
            f"records out of an object with jq: jq -c '.data[]' {stem}.json > {stem}.jsonl"
        )
    for number, value in enumerate(values, start=1):
        yield Record(file, f"record {number}", value, file.num_bytes)


def _parse_json(line: bytes) -> Any | BadRecord:
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(_decode_problem(error, line))
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not valid JSON: {error}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _decode_problem(error: UnicodeDecodeError, data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "the file is UTF-16, not UTF-8; convert it"
    return f"not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason})"


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Split on the byte \\n alone: U+2028 and the like are legal inside JSON strings."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    last = b"".join(rest)
    if last:
        yield last


def _chunks(file: RawFile, raw: BinaryIO) -> Iterator[bytes]:
    if file.name.endswith((".gz", ".zst")) and file.num_bytes == 0:
        raise DamagedFileError(f"{file} is cut short: it has 0 bytes; fetch or compress it again.")
    if file.name.endswith(".gz"):
        return _gzip_chunks(file, raw)
    if file.name.endswith(".zst"):
        return _zstd_chunks(file, raw)
    return iter(lambda: raw.read(_CHUNK_BYTES), b"")


def _gzip_chunks(file: RawFile, raw: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=raw) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFileError(f"{file} is cut short or damaged: {error}; fetch or compress it again.") from error


def _zstd_chunks(file: RawFile, raw: BinaryIO) -> Iterator[bytes]:
    """Decompress frame by frame. A stream reader would end quietly where a file was cut between two blocks."""
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = context.decompressobj()
    inside = False
    try:
        while compressed := raw.read(_COMPRESSED_CHUNK_BYTES):
            while compressed:
                inside = True
                chunk = frame.decompress(compressed)
                if chunk:
                    yield chunk
                compressed = b""
                if frame.eof:
                    compressed, inside = frame.unused_data, False
                    frame = context.decompressobj()
    except zstandard.ZstdError as error:
        raise DamagedFileError(f"{file} is damaged: {error}; fetch or compress it again.") from error
    if inside:
        raise DamagedFileError(f"{file} is cut short: its last zstd frame does not end; fetch or compress it again.")


def _read_parquet(file: RawFile, columns: list[str] | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = file.open() if file.is_remote else file.path
        with pyarrow.parquet.ParquetFile(source, page_checksum_verification=True) as table:
            names = table.schema_arrow.names
            selected = None if columns is None else [name for name in columns if name in names]
            batches = table.iter_batches(_ROWS, columns=selected or None, use_threads=False)
            yield from _rows(file, batches, table.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise DamagedFileError(f"{file} is not a whole parquet file: {_first_line(error)}") from error


def _read_arrow(file: RawFile, columns: list[str] | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.PythonFile(file.open()) if file.is_remote else pyarrow.memory_map(file.path) as source:
            if source.read(6) == b"ARROW1":
                with pyarrow.ipc.open_file(source) as table:
                    batches = (table.get_batch(number) for number in range(table.num_record_batches))
                    yield from _rows(file, _slices(batches, columns), None)
                return
            source.seek(max(0, source.size() - len(_ARROW_END)))
            if source.read() != _ARROW_END:  # without this mark a reader takes the cut for the end
                raise DamagedFileError(f"{file} is cut short: its Arrow stream does not end; write it again.")
            source.seek(0)
            with pyarrow.ipc.open_stream(source) as stream:
                yield from _rows(file, _slices(stream, columns), None)
    except pyarrow.ArrowException as error:
        raise DamagedFileError(f"{file} is not a whole Arrow file: {_first_line(error)}") from error


def _read_hub(file: RawFile, columns: list[str] | None) -> Iterator[Record]:
    for number, value in enumerate(read_dataset_shard(file, columns), start=1):
        yield Record(file, f"row {number}", value, file.num_bytes)


def _slices(batches: Iterable[Any], columns: list[str] | None) -> Iterator[Any]:
    for batch in batches:
        names = batch.schema.names
        selected = batch if columns is None else batch.select([name for name in columns if name in names] or names)
        for start in range(0, batch.num_rows, _ROWS):
            yield selected.slice(start, _ROWS)


def _rows(file: RawFile, batches: Iterable[Any], num_rows: int | None) -> Iterator[Record]:
    """Rows of Arrow batches. ``num_rows`` (where it is known) tells how far the file is read."""
    size = file.num_bytes
    row = 0
    for batch in batches:
        for value in _batch_values(batch):
            row += 1
            read = size if num_rows is None else size * row // num_rows
            yield Record(file, f"row {row}", value, read)


def _batch_values(batch: Any) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_row_value(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _row_value(row: Any) -> Any | BadRecord:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRecord(f"not valid UTF-8: {error.reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

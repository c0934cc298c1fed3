"""Every kind of file, written by somebody else's code, and every trap with a file that has it."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from dsft.corpus.listing import TEXT_FILES_PER_SHARD, list_shards, listing_fingerprint
from dsft.corpus.samples import BadRecord
from dsft.corpus.sources import Record, read_records
from dsft.errors import DataError

ROWS = [{"text": f"row {number} é\u2028x", "id": number} for number in range(700)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path: Path | str, columns: list[str] | None = None) -> list[Record]:
    return [record for shard in list_shards("s", str(path)) for record in read_records(shard, columns)]


def values(path: Path | str, columns: list[str] | None = None) -> list[object]:
    return [record.value for record in read(path, columns)]


def write_datasets(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def write_arrow_file(folder: Path) -> Path:
    path = folder / "a.arrow"
    pa.feather.write_feather(pa.Table.from_pylist(ROWS), path, compression="uncompressed")
    return path


def write_arrow_stream(folder: Path) -> Path:
    path = folder / "b.arrow"
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=300)
    return folder / "a.parquet"


def write_file(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


WRITERS = {
    "jsonl": write_file("a.jsonl", JSONL),
    "crlf": write_file("a.jsonl", JSONL.replace(b"\n", b"\r\n")),
    "bom": write_file("a.jsonl", b"\xef\xbb\xbf" + JSONL),
    "no last line end": write_file("a.jsonl", JSONL.rstrip()),
    "blank lines": write_file("a.jsonl", b"\n \r\n" + JSONL.replace(b"\n", b"\n\n")),
    "gzip": write_file("a.jsonl.gz", gzip.compress(JSONL)),
    "gzip in two members": write_file("a.jsonl.gz", gzip.compress(JSONL[:999]) + gzip.compress(JSONL[999:])),
    "zstd": write_file("a.jsonl.zst", zstandard.compress(JSONL)),
    "zstd in two frames": write_file("a.jsonl.zst", zstandard.compress(JSONL[:999]) + zstandard.compress(JSONL[999:])),
    "zstd with a skippable frame": write_file(
        "a.jsonl.zst", b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(JSONL)
    ),
    "parquet": write_parquet,
    "arrow stream": write_arrow_stream,
    "arrow file": write_arrow_file,
    "datasets": write_datasets,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    assert values(WRITERS[kind](tmp_path)) == ROWS


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file", "datasets"])
def test_tables_read_only_the_columns_asked_for(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    assert values(path, ["text"]) == [{"text": row["text"]} for row in ROWS]
    assert values(path, ["absent"]) == ROWS  # so that the error can name the fields there are


def test_places_are_lines_and_rows(tmp_path: Path) -> None:
    records = read(write_file("a.jsonl", b'\n{"a": 1}\n\n{"a": 2}')(tmp_path))
    assert [record.location for record in records] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:4"]
    assert read(write_parquet(tmp_path))[299].place == "row 300"
    assert records[-1].read_bytes == (tmp_path / "a.jsonl").stat().st_size


def test_a_long_line(tmp_path: Path) -> None:
    path = write_file("a.jsonl", json.dumps({"text": "x" * 50_000_000}).encode())(tmp_path)
    (record,) = read(path)
    assert len(record.value["text"]) == 50_000_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not valid UTF-8: byte 0xff at offset 10"),
        (b'{"text": NaN}', "NaN is not JSON"),
        (b'{"text": -Infinity}', "-Infinity is not JSON"),
        (b'{"text": "a', "not valid JSON: Unterminated string"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "UTF-16"),
    ],
)
def test_a_bad_line_is_reported_and_the_next_is_read(line: bytes, reason: str, tmp_path: Path) -> None:
    bad, good = read(write_file("a.jsonl", line + b'\n{"text": "good"}\n')(tmp_path))
    assert isinstance(bad.value, BadRecord)
    assert reason in str(bad.value)
    assert bad.place == "1"
    assert good.value == {"text": "good"}


def test_invalid_utf8_in_a_table_costs_one_row(tmp_path: Path) -> None:
    bytes_column = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, bytes_column.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    good, bad, fine = read(tmp_path / "a.parquet")
    assert (good.value, fine.value) == ({"text": "good"}, {"text": "fine"})
    assert isinstance(bad.value, BadRecord)


def zstd_cut_at_a_block_border() -> bytes:
    """A frame of two blocks (128 KiB each) without its second: each block there is whole."""
    data = os.urandom(200_000).hex().encode()
    whole = zstandard.ZstdCompressor(write_content_size=False).compress(b'{"text": "' + data + b'"}\n' * 2)
    header = zstandard.frame_header_size(whole)
    first = int.from_bytes(whole[header : header + 3], "little") >> 3
    assert not whole[header] & 1, "the first block must not be the last"
    return whole[: header + 3 + first]


def test_the_cut_at_a_block_border_is_one_that_a_stream_reader_does_not_see() -> None:
    import io

    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(zstd_cut_at_a_block_border()))
    assert len(reader.read()) == 1 << 17


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.zst", zstandard.compress(JSONL)[:-20]),
        ("b.jsonl.zst", zstd_cut_at_a_block_border()),
        ("c.jsonl.zst", zstandard.compress(JSONL) + b"rubbish"),
        ("d.jsonl.zst", zstandard.compress(JSONL) + zstandard.compress(JSONL)[:6]),
        ("e.jsonl.gz", gzip.compress(JSONL)[:-20]),
        ("f.jsonl.gz", gzip.compress(JSONL)[:-4]),
        ("g.jsonl.gz", b"not gzip at all"),
        ("h.parquet", b"PAR1 not parquet"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(name: str, data: bytes, tmp_path: Path) -> None:
    path = write_file(name, data)(tmp_path)
    with pytest.raises(DataError, match=name):
        read(path)


@pytest.mark.parametrize("writer", [write_parquet, write_arrow_stream, write_arrow_file])
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_cut_table_is_an_error(writer: Callable[[Path], Path], share: float, tmp_path: Path) -> None:
    path = writer(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: math.ceil(len(data) * share)])
    with pytest.raises(DataError, match=path.name):
        read(path)


def test_an_arrow_stream_cut_between_two_batches_is_an_error(tmp_path: Path) -> None:
    path = write_arrow_stream(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        assert stream.read_all().num_rows == len(ROWS), "the trap is not set: pyarrow itself sees nothing"
    with pytest.raises(DataError, match="cut short"):
        read(path)


def test_text_files_are_documents_and_many_make_a_shard(tmp_path: Path) -> None:
    count = TEXT_FILES_PER_SHARD + 2
    for number in range(count):
        (tmp_path / f"{number:04d}.txt").write_bytes(b"\xef\xbb\xbftext\r\n%d" % number)
    shards = list_shards("s", str(tmp_path))
    assert [len(shard.files) for shard in shards] == [TEXT_FILES_PER_SHARD, 2]
    assert values(tmp_path)[:2] == [{"text": "text\r\n0"}, {"text": "text\r\n1"}]
    assert read(tmp_path, ["body"])[0].value == {"body": "text\r\n0"}
    assert read(tmp_path)[3].location == f"{tmp_path}/0003.txt"


def test_paths_in_all_their_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/.hidden.jsonl", "a/notes.md", "c/3.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(JSONL)
    monkeypatch.chdir(tmp_path)

    def names(path: str | list[str]) -> list[str]:
        return [shard.name for shard in list_shards("s", path)]

    assert names(".") == ["a/1.jsonl", "b/2.jsonl", "c/3.jsonl.gz"]
    assert names("*/*.jsonl") == ["a/1.jsonl", "b/2.jsonl"]
    assert names("**/*.jsonl") == ["a/1.jsonl", "b/2.jsonl"]
    assert names(str(tmp_path / "[ab]")) == ["1.jsonl", "2.jsonl"]
    assert names(["c", "a/1.jsonl"]) == ["1.jsonl", "3.jsonl.gz"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.jsonl", "there is no file or folder nothing.jsonl"),
        ("no*.jsonl", "holds no file of a known kind"),
        ("empty", "holds no file of a known kind"),
        ("zero.jsonl", "is empty"),
        ("table.csv", "is of no known kind"),
        (["good.jsonl", "*.jsonl"], "named twice"),
    ],
)
def test_paths_that_cannot_be_meant(
    path: str | list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("x")
    (tmp_path / "zero.jsonl").touch()
    (tmp_path / "good.jsonl").write_bytes(JSONL)
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match=message):
        list_shards("s", path)


def test_a_dataset_dict_asks_for_a_split(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="splits train"):
        list_shards("s", str(tmp_path / "d"))
    assert values(tmp_path / "d" / "train") == ROWS
    (tmp_path / "d" / "train" / "cache-1.arrow").write_bytes(b"a cache that is no data")
    assert values(tmp_path / "d" / "train") == ROWS


def test_the_listing_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = write_file("a.jsonl", JSONL)(tmp_path)
    first = listing_fingerprint(list_shards("s", str(tmp_path)))
    assert first == listing_fingerprint(list_shards("s", str(path)))
    os.utime(path, ns=(1, 1))
    assert first != listing_fingerprint(list_shards("s", str(tmp_path)))


def test_a_json_array_is_read_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    for named in (path, f"{tmp_path}/*.json"):
        records = read(named)
        assert [record.value for record in records] == ROWS
        assert records[1].location == f"{path}:record 2"
    with pytest.raises(DataError, match=r"read only where they are named: .*\*\.json"):
        read(tmp_path)
    (tmp_path / "more.jsonl").write_bytes(JSONL)
    assert len(read(tmp_path)) == len(ROWS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"data": [{"text": "x"}]}', "it is an object"),
        ('{"text": "x"}\n{"text": "y"}\n', "Extra data.*one record a line .jsonl"),
        ('[{"text": "x"}', "not valid JSON"),
    ],
)
def test_json_that_is_no_array_says_what_to_do(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=f"not one JSON array of records: .*{words}"):
        read(tmp_path / "a.json")

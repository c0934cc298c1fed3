"""Token files of megatron-core and datatrove (``token_files/README.md``) become stores without being copied."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dsft.config.models import SourceSection
from dsft.corpus.prepare import prepare_sources
from dsft.corpus.preview import preview_source
from dsft.corpus.progress import PrepareProgress
from dsft.corpus.statistics import source_statistics
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.errors import DamagedFileError, DataError
from dsft.sampling.fim import FillInTheMiddle
from dsft.store.reader import SourceStore, read_index_metadata, verify_shard
from dsft.train.verify_run import verify_run
from tests.support.run_log import LoggedRun

FILES = Path(__file__).parent / "token_files"
NAMES = ["megatron-uint16.bin", "megatron-int32.bin", "datatrove-2.ds", "datatrove-4.ds"]


def expected() -> list[list[int]]:
    return [[(7 * i + 3 * j) % 697 + 3 for j in range(37 * i % 119)] + [2] for i in range(1, 41)]


def prepare(
    path: Path | tuple[str, ...], tokenizer: Tokenizer, tmp_path: Path, lines: list[str] | None = None, **keys: Any
) -> SourceStore:
    def progress(report: PrepareProgress) -> None:
        if lines is not None and report.line:
            lines.append(report.line)

    where = path if isinstance(path, tuple) else str(path)
    section = SourceSection(name="docs", path=where, format="tokens", **keys)
    (folder,) = prepare_sources([section], tokenizer, tmp_path / "store", 0, 1, "error", progress)
    return SourceStore(folder)


def copied(name: str, tmp_path: Path) -> Path:
    for file in FILES.glob(f"{Path(name).stem}.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / name


def index_of(path: Path) -> Path:
    return path.with_suffix(".idx") if path.suffix == ".bin" else Path(f"{path}.index")


def documents(store: SourceStore, shard: int = 0) -> list[list[int]]:
    verify_shard(store, shard)
    offsets = store.index(shard).token_offsets
    return [store.tokens(shard)[start:end].tolist() for start, end in pairwise(offsets)]


@pytest.mark.parametrize("name", NAMES)
def test_the_documents_are_those_written_and_the_tokens_stay(
    name: str, tmp_path: Path, base_tokenizer: Tokenizer
) -> None:
    lines: list[str] = []
    store = prepare(FILES / name, base_tokenizer, tmp_path, lines)
    assert documents(store) == expected()
    assert store.manifest.token_dtype == ("uint32" if "4" in name or "32" in name else "uint16")
    assert int(store.manifest.num_targets.sum()) == sum(len(ids) - 1 for ids in expected())
    assert os.path.realpath(Path(store.place) / "shard-000000.tokens") == str((FILES / name).resolve())
    assert lines == []
    assert source_statistics(store).bytes_per_token == 0  # nobody knows
    np.testing.assert_array_equal(store.index(0).spans[:, 1], store.index(0).lengths)


def test_documents_without_the_tokenizers_begin_are_said(tmp_path: Path, tokenizer_folders: dict[str, str]) -> None:
    lines: list[str] = []
    tokenizer = load_tokenizer(tokenizer_folders["legacy"])  # puts <s> before each text
    store = prepare(FILES / "datatrove-2.ds", tokenizer, tmp_path, lines)
    assert len(lines) == 1
    assert "40 of 40 documents do not begin with the token 1" in lines[0]
    metadata = read_index_metadata(Path(store.place) / "shard-000000.index")
    assert (metadata["num_with_prefix"], metadata["num_with_suffix"]) == (0, 40)


def test_a_folder_of_both_kinds_is_ordered_by_name(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    for name in (NAMES[0], NAMES[2]):
        copied(name, tmp_path)
    store = prepare(tmp_path, base_tokenizer, tmp_path)
    assert store.manifest.raw_names == ("datatrove-2.ds", "megatron-uint16.bin")
    assert documents(store, 0) == documents(store, 1) == expected()


def test_two_types_of_token_are_refused(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"datatrove-2\.ds of uint16 and datatrove-4\.ds of uint32"):
        prepare(tuple(str(FILES / name) for name in NAMES[2:]), base_tokenizer, tmp_path)


@pytest.mark.parametrize("objective", [None, FillInTheMiddle(0.5, 0.5, 700, 701, 702, 0, 1)])
def test_two_epochs_over_them_are_proved(
    objective: FillInTheMiddle | None, tmp_path: Path, base_tokenizer: Tokenizer
) -> None:
    store = prepare(tuple(str(FILES / name) for name in (NAMES[0], NAMES[2])), base_tokenizer, tmp_path)
    config = {
        "model": {"path": "-"},
        "data": {"pack_tokens": 64, "sources": [{"name": "docs", "path": "-", "format": "tokens"}]},
        "train": {"epochs": 2, "global_batch_packs": 4, "lr": 1e-3},
    }
    run = LoggedRun(tmp_path / "run", [store], config, (objective,))
    run.attempt("one", 3)
    report = verify_run(tmp_path / "run", lambda step, last: None)
    assert report.is_proved, report.problems
    assert [(epoch.documents, epoch.is_complete) for epoch in report.sources["docs"]] == [(80, True)] * 2


def test_a_changed_token_is_found_by_its_block(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    path = copied(NAMES[0], tmp_path)
    store = prepare(path, base_tokenizer, tmp_path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[1001] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=times)  # nothing but the hash can tell
    store = prepare(path, base_tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"a link to .*megatron-uint16\.bin\): block 0"):
        verify_shard(store, 0)


def test_a_file_that_was_made_anew_is_indexed_anew(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    path = copied(NAMES[0], tmp_path)
    before = prepare(path, base_tokenizer, tmp_path).fingerprint
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    store = prepare(path, base_tokenizer, tmp_path)
    assert documents(store) != expected()
    assert store.fingerprint != before


def test_a_file_that_is_gone_is_named(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    path = copied(NAMES[0], tmp_path)
    store = prepare(path, base_tokenizer, tmp_path)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"a link to .*megatron-uint16\.bin\) is missing"):
        store.tokens(0)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_files_that_are_cut_or_grown_are_refused(name: str, tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    path = copied(name, tmp_path)
    tokens, index = path.read_bytes(), index_of(path).read_bytes()
    for damaged, message in ((tokens[:-2], "points up to byte"), (tokens + b"\0\0", "describes the first")):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=message):
            prepare(path, base_tokenizer, tmp_path)
    path.write_bytes(tokens)
    for cut in (20, len(index) - 5):
        index_of(path).write_bytes(index[:cut])
        with pytest.raises(DamagedFileError, match=index_of(path).name):
            prepare(path, base_tokenizer, tmp_path)


def test_megatron_indices_that_are_not_understood_are_refused(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    path = copied(NAMES[0], tmp_path)
    index = index_of(path)
    good = index.read_bytes()
    num_sequences = int.from_bytes(good[18:26], "little")
    pointer = 34 + 4 * num_sequences + 8
    cases = {
        b"X" + good[1:]: "no Megatron index",
        good[:9] + b"\2" + good[10:]: "version 2",
        good[:17] + b"\5" + good[18:]: "type 5 \\(int64\\)",
        good + bytes(num_sequences): "multimodal",
        good[:pointer] + b"\0" * 8 + good[pointer + 8 :]: "one after the other",
        good[:-8] + b"\1" + b"\0" * 7: "divide its sequences",
    }
    for data, message in cases.items():
        index.write_bytes(data)
        with pytest.raises(DataError, match=message):
            prepare(path, base_tokenizer, tmp_path)


def test_datatrove_files_that_are_not_understood_are_refused(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    path = copied(NAMES[2], tmp_path)
    Path(f"{path}.metadata").write_text("tiny|4\n2415\n2.42 kT")
    with pytest.raises(DamagedFileError, match="points up to byte 9660"):
        prepare(path, base_tokenizer, tmp_path)
    Path(f"{path}.metadata").unlink()
    assert documents(prepare(path, base_tokenizer, tmp_path)) == expected()
    ends = np.frombuffer(index_of(path).read_bytes(), "<u8").copy()
    ends[[3, 4]] = ends[[4, 3]]
    index_of(path).write_bytes(ends.tobytes())
    with pytest.raises(DamagedFileError, match="one after the other"):
        prepare(path, base_tokenizer, tmp_path)
    Path(f"{path}.loss").write_bytes(b"\1")
    with pytest.raises(DataError, match="masks tokens"):
        prepare(path, base_tokenizer, tmp_path)


def test_a_token_of_another_tokenizer_is_refused(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    document, token = next((n, t) for n, ids in enumerate(expected()) for t in ids if t >= 500)
    message = rf"\(in document {document}\) is {token}, and the tokenizer has 500 tokens"
    with pytest.raises(DataError, match=message):
        prepare(FILES / NAMES[0], replace(base_tokenizer, vocab_tokens=500), tmp_path)


def test_what_needs_text_or_a_mask_is_refused_by_name(tmp_path: Path, base_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValidationError, match="text_field: the format tokens has no text and no mask"):
        SourceSection(name="a", path="x.bin", format="tokens", supervise="last_assistant")
    section = SourceSection(name="a", path=str(FILES / NAMES[0]), format="tokens")
    with pytest.raises(DataError, match="no records to look at"):
        list(preview_source(section, base_tokenizer, 1))
    with pytest.raises(DataError, match="is a URL"):
        prepare(("s3://bucket/x.bin",), base_tokenizer, tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        prepare(tmp_path / "x.bin", base_tokenizer, tmp_path)
    (tmp_path / "x.bin").write_bytes(b"12")
    with pytest.raises(DataError, match=r"x\.idx, which says"):
        prepare(tmp_path / "x.bin", base_tokenizer, tmp_path)

"""Which raw files a source has, in what order, and whether they are the ones of last time."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsft.config.remote_path import is_hub, is_remote
from dsft.corpus.hub import list_dataset
from dsft.corpus.raw_file import RawFile
from dsft.errors import DataError
from dsft.remote import list_remote
from dsft.store.manifest import fingerprint

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".arrow")
"""What a source may hold."""

ARRAY_SUFFIX = ".json"
"""One JSON array of records; read only where it is named, because the .json files of a folder are mostly about data."""

TEXT_FILES_PER_SHARD = 256
"""A .txt file is one document; this many consecutive ones make one shard."""


@dataclass(frozen=True, slots=True)
class RawShard:
    """One raw shard: a file, or some consecutive .txt files.

    Attributes:
        name: path of its first file, relative to what the configuration names.
        files: in order.
        num_bytes: size of all files.
        identity: hash of the files' names, sizes and versions (time of change, or ETag).
    """

    name: str
    files: tuple[RawFile, ...]
    num_bytes: int
    identity: str


def list_shards(source_name: str, path: str | Sequence[str], suffixes: tuple[str, ...] = SUFFIXES) -> list[RawShard]:
    """List the raw shards of a source, sorted by path.

    Args:
        source_name: for messages.
        path: file, folder (searched to any depth), glob, URL of one of these, or a list of them.
        suffixes: of the files that are read.

    Raises:
        DataError: something named does not exist, holds no readable kind of file, is empty, or is named twice.
    """
    entries = [path] if isinstance(path, str) else list(path)
    files: dict[str, RawFile] = {}
    for entry in entries:
        found = list(_expand(source_name, entry, suffixes))
        if not found:
            raise DataError(
                f"data source {source_name!r}: {entry} holds no file of a known kind ({', '.join(suffixes)}), so there "
                f"is nothing to read; check the path. In a folder, {ARRAY_SUFFIX} files are read only where they are "
                f"named: {Path(entry, '*' + ARRAY_SUFFIX)}; .bin and .ds files with format: tokens."
            )
        for file in found:
            if (key := absolute(file.path)) in files:
                raise DataError(f"data source {source_name!r}: {file.path} is named twice, by {', '.join(entries)}.")
            files[key] = file
    if not any(file.num_bytes for file in files.values()):
        raise DataError(f"data source {source_name!r} is empty: all {len(files)} files of {entries[0]} have 0 bytes.")
    return list(_group([files[key] for key in sorted(files)]))


def listing_fingerprint(shards: Sequence[RawShard]) -> str:
    """Hash over all raw shards' identities, in order."""
    return fingerprint([shard.identity for shard in shards])


def absolute(path: str) -> str:
    """A path that does not depend on the working folder; a URL as it is."""
    return path if is_remote(path) else os.path.abspath(path)


def _expand(source_name: str, entry: str, suffixes: tuple[str, ...]) -> Iterator[RawFile]:
    path = Path(entry)
    named = (*SUFFIXES, ARRAY_SUFFIX) if suffixes == SUFFIXES else suffixes
    if is_hub(entry):
        yield from list_dataset(source_name, entry, suffixes)
    elif is_remote(entry):
        yield from _remote(entry)
    elif path.is_dir():
        yield from _folder(source_name, path, suffixes)
    elif path.is_file():
        if not entry.endswith(named):
            raise DataError(
                f"data source {source_name!r}: {entry} is of no known kind; a source reads {', '.join(SUFFIXES)}, a "
                f"{ARRAY_SUFFIX} file that is one array of records, or a folder that datasets.save_to_disk wrote; with "
                "format: tokens .bin and .ds files."
            )
        yield describe_file(path, path.parent)
    elif glob.has_magic(entry):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        for name in sorted(glob.glob(entry, recursive=True)):
            match = Path(name)
            if match.is_dir():
                yield from _folder(source_name, match, suffixes)
            elif name.endswith(named):
                yield describe_file(match, root)
    else:
        raise DataError(f"data source {source_name!r}: there is no file or folder {entry} (in {os.getcwd()}).")


def _remote(url: str) -> Iterator[RawFile]:
    fixed = "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), url.split("/"))).rstrip("/") + "/"
    for entry in list_remote(url, (*SUFFIXES, ARRAY_SUFFIX) if url.endswith(ARRAY_SUFFIX) else SUFFIXES):
        root = fixed if entry.url != url else url.rpartition("/")[0] + "/"
        yield RawFile(entry.url.removeprefix(root), entry.url, entry.num_bytes, entry.version)


def _folder(source_name: str, folder: Path, suffixes: tuple[str, ...]) -> Iterator[RawFile]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise DataError(
            f"data source {source_name!r}: {folder} is a saved DatasetDict with the splits {', '.join(splits)}; "
            f"name one of them, such as {folder / splits[0]}."
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = json.loads((folder / "state.json").read_text())  # other .arrow files there are caches
        for item in state["_data_files"]:
            yield describe_file(folder / item["filename"], folder)
        return
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.endswith(suffixes) and not name.startswith("."):
                yield describe_file(Path(parent, name), folder)


def describe_file(path: Path, root: Path) -> RawFile:
    """A file as a listing has it, named from ``root`` on. Raises DataError where it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    name = os.path.relpath(path, root)
    return RawFile(Path(name).as_posix(), str(path), status.st_size, str(status.st_mtime_ns))


def _group(files: Sequence[RawFile]) -> Iterator[RawShard]:
    group: list[RawFile] = []
    for file in files:
        joins = file.name.endswith(".txt") and 0 < len(group) < TEXT_FILES_PER_SHARD and group[0].name.endswith(".txt")
        if group and not joins:
            yield join_files(group)
            group = []
        group.append(file)
    yield join_files(group)


def join_files(files: Sequence[RawFile]) -> RawShard:
    """The shard that consists of these files."""
    return RawShard(
        name=files[0].name,
        files=tuple(files),
        num_bytes=sum(file.num_bytes for file in files),
        identity=fingerprint([[file.name, file.num_bytes, file.version] for file in files]),
    )

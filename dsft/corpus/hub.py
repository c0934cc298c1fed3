"""Datasets of the Hugging Face Hub, by name, configuration and split, at a commit.

``datasets`` says which files a split consists of. Files of a kind that dsft reads are read as any other remote file:
``datasets`` infers one type for each column of JSON lines, and what does not fit it comes out as something else
(``1`` beside ``1.5`` as ``1.0``, a date as a time). Of other kinds (csv, json, text by lines, webdataset) each of the
dataset's own shards is a raw shard, which ``datasets`` streams.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from dsft.config.remote_path import HubDataset, parse_hub_path
from dsft.corpus.raw_file import RawFile
from dsft.errors import DamagedFileError, DataError
from dsft.remote import retried

_OWN_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""Kinds in which a row for ``datasets`` is a record for dsft (not so .txt, and .arrow comes with caches)."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_READ_ROUNDS = 2
"""Of six attempts each by huggingface_hub; with the 20 rounds of datasets a server may be away for 15 minutes."""
_PATHS_A_REQUEST = 500
_PATHS_SHOWN = 8


def list_dataset(source_name: str, url: str, suffixes: Sequence[str]) -> Iterator[RawFile]:
    """The raw files or shards of a split of a dataset.

    Args:
        source_name: for messages.
        url: ``hub://OWNER/NAME@COMMIT/CONFIG/SPLIT``.
        suffixes: of the files that the source may read.

    Raises:
        DataError: no commit, configuration or split is named (the message names those there are), there is none of
            that name, the dataset needs code of its own, or the hub cannot be reached.
    """
    dataset = parse_hub_path(url)
    if not (dataset.split and dataset.config and _COMMIT.fullmatch(dataset.revision or "")):
        _refuse_incomplete(source_name, dataset)
    builder = _builder(url, dataset)
    splits = builder.config.data_files or {}
    if dataset.split not in splits:
        raise DataError(
            f"data source {source_name!r}: {url}: there is no split {dataset.split}; the splits of {dataset.config} "
            f"are {', '.join(splits)}."
        )
    paths = [str(file) for file in splits[dataset.split]]
    infos = _infos(url, dataset, paths)
    if _is_plain(builder) and all(path.endswith(_OWN_SUFFIXES) and path.endswith(tuple(suffixes)) for path in paths):
        for path in paths:
            num_bytes, version = infos[path]
            yield RawFile(_inside(path), path, num_bytes, version)
        return
    num_shards = _streamed(url).num_shards
    sizes = [num_bytes for num_bytes, _ in infos.values()]
    if len(sizes) != num_shards:  # files inside archives: the sizes serve the progress and the order of work
        sizes = [sum(sizes) // num_shards] * num_shards
    for number, num_bytes in enumerate(sizes):
        name = f"{number:06d}-of-{num_shards:06d}"
        yield RawFile(f"{dataset.config}/{dataset.split}/{name}", f"{url}/{name}", num_bytes, str(dataset.revision))


def read_dataset_shard(file: RawFile, columns: list[str] | None) -> Iterator[Mapping[str, Any]]:
    """Stream the rows of a shard of a dataset, in order.

    Args:
        file: from ``list_dataset``.
        columns: read only these columns where the dataset has them; None reads all.

    Raises:
        DataError: the hub cannot be reached, after the attempts that its library makes.
        DamagedFileError: the shard is not what its kind of file should be, or its columns are not all of one type.
    """
    import httpx2

    url, _, name = file.path.rpartition("/")
    number, _, num_shards = name.partition("-of-")
    row = 0
    try:
        shard = _streamed(url).shard(num_shards=int(num_shards), index=int(number))
        if columns and shard.column_names and set(columns) <= set(shard.column_names):
            shard = shard.select_columns(columns)
        for value in shard:
            row += 1
            yield value
    except (OSError, httpx2.HTTPError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zlib.error) as error:
        reason = (str(error).split("?")[0].strip() or type(error).__name__).splitlines()[0]  # after ?: a signature
        if isinstance(error, OSError | httpx2.HTTPError) and not isinstance(error, gzip.BadGzipFile):
            again = "start again when the hub answers"
            raise DataError(f"{file} cannot be read after row {row}: {reason}; {again}.") from error
        raise DamagedFileError(f"{file} cannot be read after row {row} by datasets: {reason}") from error


def _refuse_incomplete(source_name: str, dataset: HubDataset) -> None:
    """Raise DataError with the whole path of each split at today's commit."""
    import datasets
    import huggingface_hub

    url = str(dataset)
    api = huggingface_hub.HfApi()
    commit = retried(url, lambda: api.dataset_info(dataset.repo, revision=dataset.revision)).sha
    configs = retried(url, lambda: datasets.get_dataset_config_names(_place(dataset.repo), revision=commit))
    found = []
    for config in [dataset.config] if dataset.config in configs else configs[:_PATHS_SHOWN]:
        builder = _builder(url, HubDataset(dataset.repo, commit, config, None))
        found += [str(HubDataset(dataset.repo, commit, config, split)) for split in builder.config.data_files or {}]
    more = f" (and others, of {len(configs)} configurations)" if len(found) > _PATHS_SHOWN else ""
    raise DataError(
        f"data source {source_name!r}: {url} names no commit, configuration and split. A branch may move between two "
        f"starts, so the commit is part of the path; today's are: {', '.join(found[:_PATHS_SHOWN])}{more}."
    )


def _place(repo: str) -> str:
    """A dataset's name as ``datasets`` takes it for one of the hub, and not for a folder that happens to be there."""
    return f"hf://datasets/{repo}"


def _builder(url: str, dataset: HubDataset) -> Any:
    import datasets

    def request() -> Any:
        try:
            return datasets.load_dataset_builder(_place(dataset.repo), dataset.config, revision=dataset.revision)
        except (ValueError, RuntimeError) as error:  # no such configuration; a script; no file of a known kind
            raise DataError(f"{url} cannot be used: {error}") from error

    datasets.disable_progress_bars()
    return retried(url, request)


def _is_plain(builder: Any) -> bool:
    """Whether the dataset's card asks for nothing but files: no field of a document, no columns, no filter."""
    config = builder.config
    named = {key: getattr(config, key) for key in ("name", "version", "data_dir", "data_files", "description")}
    return bool(config == type(config)(**named))


@lru_cache(maxsize=16)
def _streamed(url: str) -> Any:
    """The stream of a whole split; kept, because making it asks the hub for the types of the columns."""
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = _READ_ROUNDS
    dataset = parse_hub_path(url)
    builder = _builder(url, dataset)
    stream = retried(url, lambda: builder.as_streaming_dataset(split=dataset.split))
    if stream.features is not None:
        stream = stream.decode(False)  # images and sounds stay bytes
    if hasattr(builder.config, "on_mixed_types"):  # else a number in a column of text puts quotes around its neighbours
        builder.config.on_mixed_types = None
    return stream


def _infos(url: str, dataset: HubDataset, paths: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Size in bytes and version of each file of a dataset."""
    import huggingface_hub

    for path in paths:
        if not path.startswith(f"{_place(dataset.repo)}@"):
            raise DataError(f"{url}: its card names {path}, which is not in its repository; name that file itself.")
    api = huggingface_hub.HfApi()
    found: dict[str, tuple[int, str]] = {}
    for start in range(0, len(paths), _PATHS_A_REQUEST):
        inside = {_inside(path): path for path in paths[start : start + _PATHS_A_REQUEST]}
        entries = retried(
            url,
            lambda names=list(inside): api.get_paths_info(  # type: ignore[misc]
                dataset.repo, names, revision=dataset.revision, repo_type="dataset"
            ),
        )
        for entry in entries:
            assert isinstance(entry, huggingface_hub.RepoFile), entry
            found[inside[entry.path]] = (entry.size, entry.blob_id)
    return {path: found[path] for path in paths}


def _inside(path: str) -> str:
    """``hf://datasets/OWNER/NAME@COMMIT/FOLDER/FILE`` -> ``FOLDER/FILE``."""
    return path.split("/", 5)[5]

"""Prepares sources: each raw shard is tokenised once, by one worker, and published by rename.

Workers share nothing but the store's folder. Each takes the largest shard that is not published and that nobody has
claimed (``claims``), until there is none; then it waits for the others by looking at the folder, never in a collective.
Worker 0 writes the manifest when all are there, and takes what a killed worker had claimed. A worker that fails leaves
a note in the folder, and the others stop with its message.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsft.config.evaluation import EvaluationSetSection
from dsft.config.models import SourceSection
from dsft.constants import STORE_VERSION
from dsft.corpus.chat import ChatMarker
from dsft.corpus.claims import claimed, remove_claims
from dsft.corpus.encode import Encoder
from dsft.corpus.listing import RawShard, absolute, list_shards, listing_fingerprint
from dsft.corpus.notes import FailureNotes
from dsft.corpus.progress import PrepareProgress, Reporter, no_progress
from dsft.corpus.shard import ShardTask
from dsft.corpus.token_files import list_token_shards
from dsft.corpus.tokenizer import Tokenizer
from dsft.corpus.write_shard import encode_shard, index_shard, with_limit
from dsft.errors import DataError
from dsft.fsio import save_error
from dsft.store.collect import collect_manifest
from dsft.store.layout import index_path, tokens_path
from dsft.store.manifest import Manifest, fingerprint, read_manifest, write_manifest
from dsft.store.reader import read_index_metadata

_FIRST_POLL_SECONDS, _POLL_SECONDS = 0.005, 0.2
_WAIT_LINE_SECONDS = 10.0
_STALE_SECONDS = 3600.0
"""A temporary file that was not written to for this long belongs to a process that is gone."""

Section = SourceSection | EvaluationSetSection


@dataclass(frozen=True, slots=True)
class Job:
    """One source and all that is needed to prepare it."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    shards: list[RawShard]
    listing: str
    max_documents: int | None
    bad_records: Literal["error", "skip"]
    vocab_tokens: int
    write_shard: Callable[[int, RawShard, int | None, Reporter], None]
    """Makes and publishes a shard: its number, its raw files, and how many documents are to be taken (None: all)."""

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


@dataclass(frozen=True, slots=True)
class _Share:
    """This worker among all, and how it tells and hears of what happens."""

    worker: int
    num_workers: int
    reporter: Reporter
    notes: FailureNotes


def prepare_sources(
    sources: Sequence[Section],
    tokenizer: Tokenizer,
    store_dir: Path,
    worker: int,
    num_workers: int,
    bad_records: Literal["error", "skip"],
    progress: Callable[[PrepareProgress], None] = no_progress,
    waits: bool = True,
) -> list[Path]:
    """Prepare sources (or find them prepared) and return their store folders, in order.

    Args:
        sources: what to prepare; training sources and evaluation sets alike.
        tokenizer: the run's tokenizer.
        store_dir: where the stores are; all workers must see the same folder.
        worker, num_workers: this worker's number and how many work (1 waits for nobody).
        bad_records: what an unusable record means.
        progress: called up to five times a second; must be quick. What it raises ends the preparation on all workers.
        waits: until all sources are whole. Otherwise the worker that finishes a source completes it, and those before
            it leave it incomplete: for workers that do not run at the same time.

    Raises:
        DataError: bad data (names file and line), an empty source, or another worker's failure.
        SaveError: the store cannot be written.
        StoppedEarly: ``progress`` of another worker raised it.
    """
    jobs = [make_job(section, tokenizer, store_dir, bad_records) for section in sources]
    folders = [job.folder for job in jobs]
    for folder in folders:
        make_folder(folder)
    share = _Share(worker, num_workers, Reporter(progress, worker), FailureNotes(folders, worker))
    reporter, notes = share.reporter, share.notes
    try:
        for number, job in enumerate(jobs):
            reporter.begin_source(job.name)
            _prepare_source(job, share, sum(later.num_bytes for later in jobs[number + 1 :]))
        for job in jobs:
            reporter.begin_source(job.name)
            if waits or _is_whole(job, worker):
                _finish(job, share, completes=worker == 0 or not waits)
    except BaseException as error:  # whatever ends this worker, those that wait for it must hear of it
        notes.leave(error)
        raise
    reporter.end()
    return folders


def store_name(section: Section, tokenizer: Tokenizer) -> str:
    """Folder of a source's token store: its name, and a hash of all that decides its ids and of where it lies."""
    entries = [section.path] if isinstance(section.path, str) else section.path
    content = {"recipe": _recipe(section, tokenizer), "path": [absolute(entry) for entry in entries]}
    return f"{section.name}-{fingerprint(content)[:16]}"


def check_prepared(
    section: Section, tokenizer: Tokenizer, bad_records: Literal["error", "skip"], manifest: Manifest, place: str
) -> None:
    """Check a store that was prepared elsewhere. Raises DataError where it is not what this source asks for."""
    if dict(manifest.recipe) != _recipe(section, tokenizer):
        raise DataError(
            f"{place} was not prepared for this source: its tokenizer, format or version of dsft is another one. "
            "Prepare the source with this configuration, and copy it there under the name it has."
        )
    if bad_records == "error" and manifest.counts.get("bad_records"):
        raise DataError(
            f"{place} was prepared with data.bad_records: skip and lacks {manifest.counts['bad_records']} records. Set "
            "that here, too, or correct the raw data and prepare it again."
        )
    _check_not_empty(section.name, manifest)


def _check_not_empty(name: str, manifest: Manifest) -> None:
    if int(manifest.num_documents.sum()) == 0:
        dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in manifest.counts.items())
        raise DataError(
            f"data source {name!r} is empty: its {len(manifest.raw_names)} shards gave no document to learn from "
            f"(records left out: {dropped or 'none'})."
        )


def _recipe(section: Section, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides a source's ids and spans, apart from its raw files."""
    is_text = section.format in ("text", "tokens")
    return {
        "store_version": STORE_VERSION,
        "tokenizer": tokenizer.text_fingerprint if is_text else tokenizer.fingerprint,
        "format": section.format,
        "text_field": section.text_field if section.format == "text" else None,
        "columns": dict(section.columns),
        "supervise": None if is_text else section.supervise,
        "max_documents": section.max_documents if isinstance(section, EvaluationSetSection) else None,
    }


def make_encoder(section: Section, tokenizer: Tokenizer) -> Encoder:
    """The encoder of a source. Raises DataError where its conversations have no chat template."""
    marker = None
    plain = section.format == "text" or (section.format == "prompt_completion" and tokenizer.chat_template is None)
    if not plain:
        try:
            marker = ChatMarker(tokenizer)
        except DataError as error:
            raise DataError(f"data source {section.name!r} (format {section.format}): {error}") from error
    return Encoder(tokenizer, section.supervise, marker)


def make_task(section: Section, tokenizer: Tokenizer, bad_records: Literal["error", "skip"]) -> ShardTask:
    """How the records of a source are read. Raises DataError where it is tokens already, and has none."""
    if section.format == "tokens":
        raise DataError(
            f"data source {section.name!r} is of format tokens: it has no records to look at. Look at the text it was "
            "made of."
        )
    limit = section.max_documents if isinstance(section, EvaluationSetSection) else None
    has_template = tokenizer.chat_template is not None
    return ShardTask(section.format, section.text_field, has_template, bad_records, limit, section.columns)


def make_job(section: Section, tokenizer: Tokenizer, store_dir: Path, bad_records: Literal["error", "skip"]) -> Job:
    """List a source's raw shards. Raises DataError where there are none, or as ``make_encoder``."""
    folder = store_dir / store_name(section, tokenizer)
    write_shard: Callable[[int, RawShard, int | None, Reporter], None]
    if section.format == "tokens":
        shards = list_token_shards(section.name, section.path)
        write_shard = partial(index_shard, folder, tokenizer)
    else:
        shards = list_shards(section.name, section.path)
        task, encoder = make_task(section, tokenizer, bad_records), make_encoder(section, tokenizer)
        write_shard = partial(encode_shard, folder, task, encoder, tokenizer.vocab_tokens)
    return Job(
        name=section.name,
        folder=folder,
        recipe=_recipe(section, tokenizer),
        shards=shards,
        listing=listing_fingerprint(shards),
        max_documents=section.max_documents if isinstance(section, EvaluationSetSection) else None,
        bad_records=bad_records,
        vocab_tokens=tokenizer.vocab_tokens,
        write_shard=write_shard,
    )


def make_folder(folder: Path) -> None:
    """Make the store's folder and remove what killed processes left in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise save_error(folder, error) from error
    for leftover in folder.glob(".*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()
        except FileNotFoundError:
            continue  # its owner has just published or removed it


def _prepare_source(job: Job, share: _Share, later_bytes: int) -> None:
    """Make what is free of a source's shards. ``later_bytes``: of the sources after it, for the progress."""
    reporter = share.reporter
    if _fresh_manifest(job) is not None:
        pending = []
    elif job.max_documents is not None:  # how many shards they fill is known only after reading them: one worker
        if share.worker == 0:
            reporter.expect(job.num_bytes + later_bytes // share.num_workers)
            _take_documents(job, share)
        return
    else:
        pending = _unpublished(job, range(len(job.shards)))
    left_bytes = sum(job.shards[number].num_bytes for number in pending)
    reporter.skip(_part(job.num_bytes - left_bytes, share))
    _take(job, pending, share, later_bytes)


def _part(num_bytes: int, share: _Share) -> int:
    """This worker's part, so that all parts together are the whole."""
    return (num_bytes + share.worker) // share.num_workers


def _unpublished(job: Job, numbers: Iterable[int]) -> list[int]:
    return [number for number in numbers if published(job, number, job.shards[number], None) is None]


def _take(job: Job, pending: list[int], share: _Share, later_bytes: int = 0) -> None:
    """Make every shard of these that is free, as long as no worker has failed; of several workers, each takes the
    largest first, so that none is left with one when the others are done."""
    left_bytes = sum(job.shards[number].num_bytes for number in pending)
    if share.num_workers > 1:
        pending = sorted(pending, key=lambda number: -job.shards[number].num_bytes)
    for number in pending:
        share.notes.check()
        raw = job.shards[number]
        left_bytes -= raw.num_bytes
        with claimed(job.folder, number, is_alone=share.num_workers == 1) as is_mine:
            if is_mine and published(job, number, raw, None) is None:
                share.reporter.expect(raw.num_bytes + _part(left_bytes + later_bytes, share))
                job.write_shard(number, raw, None, share.reporter)
                share.reporter.end_shard(raw.num_bytes)
    share.reporter.expect(_part(later_bytes, share))


def _take_documents(job: Job, share: _Share) -> None:
    """Make the shards that hold the first ``max_documents``, in order."""
    for number, raw, limit in _limited(job):
        if published(job, number, raw, limit) is None:
            share.notes.check()
            job.write_shard(number, raw, limit, share.reporter)
            share.reporter.end_shard(raw.num_bytes)
        else:
            share.reporter.skip(raw.num_bytes)


def _limited(job: Job) -> Iterator[tuple[int, RawShard, int | None]]:
    """The shards with the number of documents still to take from each, until ``max_documents`` are taken.

    A caller must have published a shard before it asks for the next one."""
    left = job.max_documents
    for number, raw in enumerate(job.shards):
        yield number, raw, left
        if left is not None:
            metadata = published(job, number, raw, left)
            assert metadata is not None
            left -= metadata["num_documents"]
            if left == 0:
                return


def published(job: Job, number: int, raw: RawShard, limit: int | None) -> dict[str, Any] | None:
    """The index metadata of a shard that is whole and of today's raw file; None where it must be made (again)."""
    try:
        metadata = read_index_metadata(index_path(job.folder, number))
        size = tokens_path(job.folder, number).stat().st_size
    except (DataError, FileNotFoundError):
        return None
    skipped_wrongly = job.bad_records == "error" and metadata["counts"].get("bad_records")
    whole = size == metadata["num_tokens"] * np.dtype(metadata["token_dtype"]).itemsize
    right = metadata["raw_identity"] == with_limit(raw, limit).identity
    return metadata if whole and right and not skipped_wrongly else None


def _fresh_manifest(job: Job) -> Manifest | None:
    """The store's manifest, where it is of today's raw files and every shard it names is there."""
    try:
        manifest = read_manifest(job.folder)
    except DataError:
        return None
    skipped_wrongly = job.bad_records == "error" and manifest.counts.get("bad_records")
    if manifest.listing != job.listing or dict(manifest.recipe) != dict(job.recipe) or skipped_wrongly:
        return None
    names = set(os.listdir(job.folder))
    shards = range(len(manifest.raw_names))
    whole = all(path.name in names for n in shards for path in (index_path(job.folder, n), tokens_path(job.folder, n)))
    return manifest if whole else None


def _is_whole(job: Job, worker: int) -> bool:
    """Whether every shard is published; of a source that one worker takes alone, whether this is that worker."""
    if job.max_documents is not None:
        return worker == 0 or _fresh_manifest(job) is not None
    return not _unpublished(job, range(len(job.shards)))


def _finish(job: Job, share: _Share, *, completes: bool) -> None:
    """Wait until the source is whole; the worker that completes it writes the manifest."""
    if completes and _fresh_manifest(job) is None:
        num_shards = _wait_for_shards(job, share)
        manifest = collect_manifest(
            job.folder,
            name=job.name,
            recipe=job.recipe,
            listing=job.listing,
            vocab_tokens=job.vocab_tokens,
            num_shards=num_shards,
        )
        remove_claims(job.folder)
        write_manifest(job.folder, manifest)
    waiting = _Waiting(share.reporter, share.notes)
    while (found := _fresh_manifest(job)) is None:
        waiting.pause(f"worker 0 to complete {job.name}")
    _check_not_empty(job.name, found)


def _wait_for_shards(job: Job, share: _Share) -> int:
    """Wait for every shard of the source, and make those whose worker was killed; returns how many there are."""
    if job.max_documents is not None:  # all are worker 0's own
        return sum(1 for _ in _limited(job))
    pending = list(range(len(job.shards)))
    waiting = _Waiting(share.reporter, share.notes)
    while pending := _unpublished(job, pending):
        _take(job, pending, share)
        if pending := _unpublished(job, pending):
            waiting.pause(f"{len(pending)} shards of {job.name} that other workers are at")
    return len(job.shards)


class _Waiting:
    """Pauses between two looks at the folder, short ones first: the wait is at most twice as long as it must be, or
    ``_POLL_SECONDS`` longer. Says what it waits for, and stops where a worker has failed."""

    def __init__(self, reporter: Reporter, notes: FailureNotes) -> None:
        self._reporter, self._notes = reporter, notes
        self._began = self._said = time.monotonic()
        self._pause_seconds = _FIRST_POLL_SECONDS

    def pause(self, what: str) -> None:
        self._notes.check()
        self._reporter.tick()
        now = time.monotonic()
        if now - self._said >= _WAIT_LINE_SECONDS:
            self._said = now
            self._reporter.say(f"waiting for {what} ({now - self._began:.0f} s)")
        time.sleep(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, _POLL_SECONDS)

"""Prepares sources: each raw shard is tokenised once, by one worker, and published by rename.

Workers share nothing but the store's folder. Shard ``s`` belongs to worker ``s % num_workers``; a worker does its own
and then waits for the others by looking at the folder, never in a collective. Worker 0 writes the manifest when all are
there. A worker that fails leaves a note in the folder, and the others stop with its message.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dsft.config.evaluation import EvaluationSetSection
from dsft.config.models import SourceSection
from dsft.constants import STORE_VERSION
from dsft.corpus.chat import ChatMarker
from dsft.corpus.encode import Encoder
from dsft.corpus.listing import RawShard, absolute, list_shards, listing_fingerprint
from dsft.corpus.notes import FailureNotes
from dsft.corpus.progress import PrepareProgress, Reporter, no_progress
from dsft.corpus.shard import ShardTask, prepare_shard
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DamagedFileError, DataError
from dsft.fsio import save_error
from dsft.store.collect import collect_manifest
from dsft.store.layout import index_path, token_dtype, tokens_path
from dsft.store.manifest import Manifest, fingerprint, read_manifest, write_manifest
from dsft.store.reader import read_index_metadata

_POLL_SECONDS = 0.2
_WAIT_LINE_SECONDS = 10.0
_STALE_SECONDS = 3600.0
"""A temporary file that was not written to for this long belongs to a process that is gone."""

Section = SourceSection | EvaluationSetSection


@dataclass(frozen=True, slots=True)
class _Job:
    """One source and all that is needed to prepare it."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    shards: list[RawShard]
    listing: str
    task: ShardTask
    encoder: Encoder
    vocab_tokens: int

    def owner(self, number: int, num_workers: int) -> int:
        # How many shards the first n documents fill is known only after reading them, so one worker does it.
        return 0 if self.task.max_documents is not None else number % num_workers

    def owned_bytes(self, worker: int, num_workers: int) -> int:
        return sum(s.num_bytes for number, s in enumerate(self.shards) if self.owner(number, num_workers) == worker)


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
    jobs = [_job(section, tokenizer, store_dir, bad_records) for section in sources]
    reporter = Reporter(progress, worker, sum(job.owned_bytes(worker, num_workers) for job in jobs))
    for job in jobs:
        _make_folder(job.folder)
    notes = FailureNotes([job.folder for job in jobs], worker)
    try:
        for job in jobs:
            reporter.begin_source(job.name)
            if _fresh_manifest(job) is None:
                _prepare_own(job, worker, num_workers, reporter, notes)
            else:
                reporter.skip(job.owned_bytes(worker, num_workers))
        for job in jobs:
            reporter.begin_source(job.name)
            if waits or _is_whole(job, worker, num_workers):
                _finish(job, worker if waits else 0, num_workers, reporter, notes)
    except BaseException as error:  # whatever ends this worker, those that wait for it must hear of it
        notes.leave(error)
        raise
    reporter.end()
    return [job.folder for job in jobs]


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
    is_text = section.format == "text"
    return {
        "store_version": STORE_VERSION,
        "tokenizer": tokenizer.text_fingerprint if is_text else tokenizer.fingerprint,
        "format": section.format,
        "text_field": section.text_field if is_text else None,
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
    """How the records of a source are read."""
    limit = section.max_documents if isinstance(section, EvaluationSetSection) else None
    has_template = tokenizer.chat_template is not None
    return ShardTask(section.format, section.text_field, has_template, bad_records, limit, section.columns)


def _job(section: Section, tokenizer: Tokenizer, store_dir: Path, bad_records: Literal["error", "skip"]) -> _Job:
    shards = list_shards(section.name, section.path)
    return _Job(
        name=section.name,
        folder=store_dir / store_name(section, tokenizer),
        recipe=_recipe(section, tokenizer),
        shards=shards,
        listing=listing_fingerprint(shards),
        task=make_task(section, tokenizer, bad_records),
        encoder=make_encoder(section, tokenizer),
        vocab_tokens=tokenizer.vocab_tokens,
    )


def _make_folder(folder: Path) -> None:
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


def _prepare_own(job: _Job, worker: int, num_workers: int, reporter: Reporter, notes: FailureNotes) -> None:
    """Tokenise this worker's shards that are not published yet, as long as no other worker has failed."""
    if job.task.max_documents is not None and worker != job.owner(0, num_workers):
        return
    for number, raw, limit in _limited(job):
        if job.owner(number, num_workers) != worker:
            continue
        if _published(job, number, raw, limit) is None:
            notes.check()
            try:
                _prepare_shard(job, number, raw, limit, reporter)
            except DamagedFileError as error:
                if not any(file.is_remote for file in raw.files):
                    raise
                reporter.say(f"{error} Reading it once more.")  # the network may have damaged it
                _prepare_shard(job, number, raw, limit, reporter)
            reporter.end_shard(raw.num_bytes)
        else:
            reporter.skip(raw.num_bytes)


def _prepare_shard(job: _Job, number: int, raw: RawShard, limit: int | None, reporter: Reporter) -> None:
    task = replace(job.task, max_documents=limit)
    raw = _with_limit(raw, limit)
    prepare_shard(job.folder, number, raw, task, job.encoder, job.vocab_tokens, reporter.at, reporter.say)


def _limited(job: _Job) -> Iterator[tuple[int, RawShard, int | None]]:
    """The shards with the number of documents still to take from each, until ``max_documents`` are taken.

    A caller must have published a shard before it asks for the next one."""
    left = job.task.max_documents
    for number, raw in enumerate(job.shards):
        yield number, raw, left
        if left is not None:
            metadata = _published(job, number, raw, left)
            assert metadata is not None
            left -= metadata["num_documents"]
            if left == 0:
                return


def _with_limit(raw: RawShard, limit: int | None) -> RawShard:
    return raw if limit is None else replace(raw, identity=f"{raw.identity}, first {limit} documents")


def _published(job: _Job, number: int, raw: RawShard, limit: int | None) -> dict[str, Any] | None:
    """The index metadata of a shard that is whole and of today's raw file; None where it must be made (again)."""
    try:
        metadata = read_index_metadata(index_path(job.folder, number))
        size = tokens_path(job.folder, number).stat().st_size
    except (DataError, FileNotFoundError):
        return None
    skipped_wrongly = job.task.bad_records == "error" and metadata["counts"].get("bad_records")
    whole = size == metadata["num_tokens"] * token_dtype(job.vocab_tokens).itemsize
    right = metadata["raw_identity"] == _with_limit(raw, limit).identity
    return metadata if whole and right and not skipped_wrongly else None


def _fresh_manifest(job: _Job) -> Manifest | None:
    """The store's manifest, where it is of today's raw files and every shard it names is there."""
    try:
        manifest = read_manifest(job.folder)
    except DataError:
        return None
    skipped_wrongly = job.task.bad_records == "error" and manifest.counts.get("bad_records")
    if manifest.listing != job.listing or dict(manifest.recipe) != dict(job.recipe) or skipped_wrongly:
        return None
    names = set(os.listdir(job.folder))
    shards = range(len(manifest.raw_names))
    whole = all(path.name in names for n in shards for path in (index_path(job.folder, n), tokens_path(job.folder, n)))
    return manifest if whole else None


def _is_whole(job: _Job, worker: int, num_workers: int) -> bool:
    """Whether every shard is published; of a source that one worker takes alone, whether this is that worker."""
    if job.task.max_documents is not None:
        return worker == job.owner(0, num_workers) or _fresh_manifest(job) is not None
    return all(_published(job, number, raw, None) is not None for number, raw in enumerate(job.shards))


def _finish(job: _Job, worker: int, num_workers: int, reporter: Reporter, notes: FailureNotes) -> None:
    """Wait until the source is whole; worker 0 writes the manifest."""
    if worker == 0 and _fresh_manifest(job) is None:
        num_shards = _wait_for_shards(job, num_workers, reporter, notes)
        manifest = collect_manifest(
            job.folder,
            name=job.name,
            recipe=job.recipe,
            listing=job.listing,
            vocab_tokens=job.vocab_tokens,
            num_shards=num_shards,
        )
        write_manifest(job.folder, manifest)
    waiting = _Waiting(reporter, notes)
    while (found := _fresh_manifest(job)) is None:
        waiting.pause(f"worker 0 to complete {job.name}")
    _check_not_empty(job.name, found)


def _wait_for_shards(job: _Job, num_workers: int, reporter: Reporter, notes: FailureNotes) -> int:
    """Wait for every shard of the source; returns how many there are."""
    if job.task.max_documents is not None:  # all are worker 0's own
        return sum(1 for _ in _limited(job))
    pending = list(range(len(job.shards)))
    waiting = _Waiting(reporter, notes)
    while pending := [number for number in pending if _published(job, number, job.shards[number], None) is None]:
        workers = sorted({job.owner(number, num_workers) for number in pending})
        waiting.pause(f"{len(pending)} shards of {job.name} from worker {', '.join(map(str, workers))}")
    return len(job.shards)


class _Waiting:
    """Pauses between two looks at the folder, says what it waits for, and stops where a worker has failed."""

    def __init__(self, reporter: Reporter, notes: FailureNotes) -> None:
        self._reporter, self._notes = reporter, notes
        self._began = self._said = time.monotonic()

    def pause(self, what: str) -> None:
        self._notes.check()
        self._reporter.tick()
        now = time.monotonic()
        if now - self._said >= _WAIT_LINE_SECONDS:
            self._said = now
            self._reporter.say(f"waiting for {what} ({now - self._began:.0f} s)")
        time.sleep(_POLL_SECONDS)

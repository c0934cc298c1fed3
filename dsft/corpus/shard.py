"""Tokenises one raw shard, as a stream, into the token store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dsft.corpus.encode import Encoder
from dsft.corpus.formats import Format, parse_record
from dsft.corpus.listing import RawShard
from dsft.corpus.raw_file import RawFile
from dsft.corpus.samples import BadRecord, Completion, Conversation, Sample, Text
from dsft.corpus.sources import Record, read_records
from dsft.errors import DataError
from dsft.store.layout import token_dtype
from dsft.store.types import Document
from dsft.store.writer import ShardWriter

_BATCH_SAMPLES = 256
_BATCH_CHARACTERS = 1 << 20
"""A batch ends with the first sample that reaches either number: memory does not depend on the shard."""

_FINDINGS_SHOWN = 3
"""Bad records of a file that are shown one by one when they are skipped."""


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """How far the preparation of a shard is."""

    documents: int
    tokens: int
    text_bytes: int
    read_bytes: int  # of all the shard's raw files


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All that decides a shard's documents, but the tokenizer.

    Attributes:
        record_format, text_field, columns: how records are read.
        has_chat_template: strings of a prompt_completion record become messages.
        bad_records: ``error`` stops at the first unusable record, ``skip`` counts them.
        max_documents: documents to take at most; None takes all.
    """

    record_format: Format
    text_field: str
    has_chat_template: bool
    bad_records: Literal["error", "skip"]
    max_documents: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def prepare_shard(
    folder: Path,
    number: int,
    raw: RawShard,
    task: ShardTask,
    encoder: Encoder,
    vocab_tokens: int,
    report: Callable[[ShardProgress], None],
    say: Callable[[str], None],
) -> int:
    """Write shard ``number`` of a store and publish it. Returns its number of documents.

    Documents without text or without a supervised token are dropped and counted; so are bad records where ``task``
    says so.

    Raises:
        DataError: an unusable record (``file:line`` and the reason), or a damaged file.
        SaveError: the store cannot be written. Nothing half-written is left in either case.
    """
    counts: Counter[str] = Counter()
    shown: Counter[RawFile] = Counter()
    documents = tokens = text_bytes = read_bytes = finished_bytes = 0
    file = raw.files[0]
    writer = ShardWriter(folder, number, token_dtype(vocab_tokens), raw.name, raw.identity)
    try:
        for record, result in read_documents(raw, task, encoder):
            if isinstance(result, BadRecord):
                if task.bad_records == "error":
                    raise bad_record_error(record, result)
                counts["bad_records"] += 1
                shown[record.file] += 1
                if shown[record.file] <= _FINDINGS_SHOWN:
                    say(f"skipped {record.location}: {result}")
                continue
            reason = dropped_because(result)
            if reason:
                counts[reason] += 1
                continue
            writer.add(result)
            documents += 1
            tokens += len(result.ids)
            text_bytes += result.num_bytes
            if record.file != file:
                file, finished_bytes = record.file, finished_bytes + read_bytes
            read_bytes = record.read_bytes
            report(ShardProgress(documents, tokens, text_bytes, finished_bytes + read_bytes))
            if documents == task.max_documents:
                break
    except BaseException:
        writer.abort()
        raise
    for file, found in shown.items():
        say(f"skipped {found} bad records of {file}")
    writer.close(counts)
    return documents


def read_documents(
    raw: RawShard, task: ShardTask, encoder: Encoder, batch_samples: int = _BATCH_SAMPLES
) -> Iterator[tuple[Record, Document | BadRecord]]:
    """Every record of a raw shard with its document, encoded in batches. Raises DataError for a damaged file."""
    columns = [task.text_field] if task.record_format == "text" else None
    records: list[Record] = []
    samples: list[Sample | BadRecord] = []
    characters = 0
    for record in read_records(raw, columns):
        sample = parse_sample(record, task)
        records.append(record)
        samples.append(sample)
        characters += _num_characters(sample)
        if len(samples) == batch_samples or characters >= _BATCH_CHARACTERS:
            yield from _encoded(records, samples, encoder)
            records, samples, characters = [], [], 0
    yield from _encoded(records, samples, encoder)


def read_samples(raw: RawShard, task: ShardTask) -> Iterator[Sample]:
    """What the records of a raw shard say, without those that cannot be used."""
    for record in read_records(raw):
        sample = parse_sample(record, task)
        if not isinstance(sample, BadRecord):
            yield sample


def bad_record_error(record: Record, found: BadRecord) -> DataError:
    """What stops preparation at a bad record."""
    return DataError(
        f"{record.location}: {found}. Correct the record, or set data.bad_records: skip to leave such records out and "
        "count them."
    )


def parse_sample(record: Record, task: ShardTask) -> Sample | BadRecord:
    """What a record says, or why it cannot be used."""
    if isinstance(record.value, BadRecord):
        return record.value
    try:
        return parse_record(record.value, task.record_format, task.text_field, task.has_chat_template, task.columns)
    except BadRecord as error:
        return error


def _encoded(
    records: list[Record], samples: list[Sample | BadRecord], encoder: Encoder
) -> Iterator[tuple[Record, Document | BadRecord]]:
    encoded = iter(encoder.encode([sample for sample in samples if not isinstance(sample, BadRecord)]))
    for record, sample in zip(records, samples, strict=True):
        yield record, sample if isinstance(sample, BadRecord) else next(encoded)


def _num_characters(sample: Sample | BadRecord) -> int:
    if isinstance(sample, Text):
        return len(sample.text)
    if isinstance(sample, Completion):
        return len(sample.prompt) + len(sample.completion)
    if isinstance(sample, Conversation):
        return sum(len(message.content) for message in sample.messages)
    return 0


def dropped_because(document: Document) -> str | None:
    """The count under which a document is left out; None where it is kept."""
    if document.num_bytes == 0:
        return "without_text"
    return None if document.num_targets else "without_supervised_tokens"

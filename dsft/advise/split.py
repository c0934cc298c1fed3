"""Sets documents aside for evaluation, drops exact copies, and writes both parts as files a run can read.

Which side a document is on depends on its text alone (of a pair: on its prompt, so that one question is never on both).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsft.config.models import SourceSection
from dsft.corpus.formats import parse_record
from dsft.corpus.listing import list_shards
from dsft.corpus.near_duplicates import text_hash
from dsft.corpus.samples import BadRecord, Completion, Sample, Text, sample_text
from dsft.corpus.sources import Record, read_records
from dsft.errors import DataError
from dsft.fsio import atomic_file, save_error

MOST_HELD_OUT, LEAST_HELD_OUT = 300, 20
_SIGNATURES = {
    "messages": {"messages"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "sharegpt": {"conversations"},
}


@dataclass(frozen=True, slots=True)
class SplitSource:
    """Both parts of a source.

    Attributes:
        section: the training part, as a run names it.
        held_out: file of the other part.
        train_documents, held_out_documents: in them. duplicates: exact copies left out. unusable: rows that cannot be
            read as this format.
    """

    section: SourceSection
    held_out: Path
    train_documents: int
    held_out_documents: int
    duplicates: int
    unusable: int


@dataclass(slots=True)
class _Counts:
    train: int = 0
    held_out: int = 0
    duplicates: int = 0
    unusable: int = 0
    seen: set[int] = field(default_factory=set)


def find_pairs_format(path: list[str]) -> str:
    """The format whose fields the first record has.

    Raises:
        DataError: none; names the record's fields.
    """
    for shard in list_shards("pairs", path):
        for record in read_records(shard):
            fields = set(record.value) if isinstance(record.value, Mapping) else set()
            for name, needed in _SIGNATURES.items():
                if needed <= fields:
                    return name
            known = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in _SIGNATURES.items())
            raise DataError(
                f"{record.location}: the fields of this record are {', '.join(sorted(fields)) or 'none'}, and pairs "
                f"need those of a known format ({known}). Rename them."
            )
    raise DataError(f"pairs: {', '.join(path)} hold no record.")


def samples(section: SourceSection) -> Iterator[tuple[Record, Sample | BadRecord]]:
    """Every record of a source, with what it says or why it cannot be used."""
    for shard in list_shards(section.name, section.path):
        for record in read_records(shard):
            yield record, _sample(record, section)


def prompt_and_answer(sample: Sample) -> tuple[str, str] | None:
    """What stands before the last answer, and that answer; None where there is none."""
    if isinstance(sample, Text):
        return None
    if isinstance(sample, Completion):
        return sample.prompt, sample.completion
    last = max((at for at, message in enumerate(sample.messages) if message.role == "assistant"), default=0)
    if last == 0:
        return None
    return "\n".join(message.content for message in sample.messages[:last]), sample.messages[last].content


def split_source(section: SourceSection, folder: Path) -> SplitSource:
    """Write ``folder/train/*.jsonl`` (a file a raw shard) and ``folder/held_out.jsonl``. Memory: 100 bytes a row.

    Raises:
        DataError: too few usable documents to set some aside. SaveError: the folder cannot be written.
    """
    held_out = _choose(section)
    counts = _Counts()
    try:
        (folder / "train").mkdir(parents=True, exist_ok=True)
        for old in (folder / "train").glob("*.jsonl"):
            old.unlink()
    except OSError as error:
        raise save_error(folder, error) from error
    with atomic_file(folder / "held_out.jsonl") as aside:
        for number, shard in enumerate(list_shards(section.name, section.path)):
            with ExitStack() as stack:
                train = stack.enter_context(atomic_file(folder / "train" / f"shard-{number:05d}.jsonl"))
                for record in read_records(shard):
                    _place(record, _sample(record, section), held_out, counts, train, aside)
    update = {"path": str(folder / "train")}
    return SplitSource(
        section=section.model_copy(update=update),
        held_out=folder / "held_out.jsonl",
        train_documents=counts.train,
        held_out_documents=counts.held_out,
        duplicates=counts.duplicates,
        unusable=counts.unusable,
    )


def _place(
    record: Record, sample: Sample | BadRecord, held_out: set[int], counts: _Counts, train: Any, aside: Any
) -> None:
    key = None if isinstance(sample, BadRecord) else _key(sample)
    if key is None or isinstance(sample, BadRecord):
        counts.unusable += 1
        return
    whole = text_hash(sample_text(sample))
    if whole in counts.seen:
        counts.duplicates += 1
        return
    counts.seen.add(whole)
    line = json.dumps(record.value, ensure_ascii=False, default=str).encode() + b"\n"
    if key in held_out:
        counts.held_out += 1
        aside.write(line)
    else:
        counts.train += 1
        train.write(line)


def _choose(section: SourceSection) -> set[int]:
    """Keys of what is set aside: a tenth, at least 20 and at most 300, never more than a fifth; the smallest hashes."""
    keys: npt.NDArray[np.int64] = np.unique(
        np.fromiter(
            (
                key
                for _, sample in samples(section)
                if not isinstance(sample, BadRecord) and (key := _key(sample)) is not None
            ),
            np.int64,
        )
    )
    want = min(len(keys) // 5, max(LEAST_HELD_OUT, len(keys) // 10), MOST_HELD_OUT)
    if want == 0:
        raise DataError(
            f"{section.name}: {len(keys)} different usable documents are too few to set some aside for evaluation; a "
            "document should be a page or a section, not a whole collection (a .txt file is one document)."
        )
    return set(keys[:want].tolist())


def _key(sample: Sample) -> int | None:
    """Hash of the text, or of a pair's prompt; None where there is nothing to learn."""
    if isinstance(sample, Text):
        return text_hash(sample.text) if sample.text.strip() else None
    pair = prompt_and_answer(sample)
    return None if pair is None or not pair[1].strip() else text_hash(pair[0])


def _sample(record: Record, section: SourceSection) -> Sample | BadRecord:
    assert section.format != "tokens", "advise reads text and pairs"
    if isinstance(record.value, BadRecord):
        return record.value
    try:
        return parse_record(record.value, section.format, section.text_field, True, section.columns)
    except BadRecord as error:
        return error

"""Streams raw text sources into a file of bridge pairs, without what is held out and without repetitions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from dsft.config.evaluation import EvaluationSetSection
from dsft.config.models import SourceSection
from dsft.corpus.bridge_rules import BridgePair, BridgeSettings, bridge_pairs
from dsft.corpus.listing import RawShard, list_shards
from dsft.corpus.near_duplicates import ngram_hashes, shares_any, text_hash
from dsft.corpus.samples import BadRecord, Text, sample_text
from dsft.corpus.shard import ShardTask, bad_record_error, parse_sample, read_samples
from dsft.corpus.sources import Record, read_records
from dsft.errors import DataError
from dsft.fsio import atomic_file


@dataclass(frozen=True, slots=True)
class HeldOutTexts:
    """What no pair may come from.

    Attributes:
        hashes: of whole held-out texts.
        ngrams: sorted hashes of their runs of ``ngram_words`` words.
    """

    hashes: frozenset[int]
    ngrams: npt.NDArray[np.uint64]
    ngram_words: int

    def holds(self, text: str) -> bool:
        """Whether this is a held-out text, or shares a run of words with one."""
        return text_hash(text) in self.hashes or shares_any(ngram_hashes(text, self.ngram_words), self.ngrams)


@dataclass(frozen=True, slots=True)
class BridgeCounts:
    """What was read and written.

    Attributes:
        documents: with text, repeated ones too.
        bad: records that could not be read (``data.bad_records: skip``).
        repeated, held_out: documents left out whole.
        pairs: rule -> pairs written.
        repeated_pairs, held_out_pairs: left out.
    """

    documents: int
    bad: int
    repeated: int
    held_out: int
    pairs: dict[str, int]
    repeated_pairs: int
    held_out_pairs: int

    @property
    def num_pairs(self) -> int:
        """All pairs written."""
        return sum(self.pairs.values())


def read_held_out(sections: Sequence[EvaluationSetSection], ngram_words: int) -> HeldOutTexts:
    """Read the held-out sets whole. Memory: 8 bytes a word, some 60 a text. Raises DataError as ``list_shards``."""
    hashes: set[int] = set()
    grams = [np.zeros(0, dtype=np.uint64)]
    for section in sections:
        task = ShardTask(section.format, section.text_field, True, "skip", None, section.columns)
        for raw in list_shards(section.name, section.path):
            for sample in read_samples(raw, task):
                text = sample_text(sample)
                hashes.add(text_hash(text))
                grams.append(ngram_hashes(text, ngram_words))
    return HeldOutTexts(frozenset(hashes), np.unique(np.concatenate(grams)), ngram_words)


def write_bridge(
    sections: Sequence[SourceSection],
    out: Path,
    settings: BridgeSettings,
    held_out: HeldOutTexts,
    *,
    bad_records: Literal["error", "skip"],
    progress: Callable[[int], None],
) -> BridgeCounts:
    """Write the pairs of raw text sources to a JSON Lines file that is there whole or not at all.

    A line has ``messages`` (the format of that name) and where the pair is from: ``source``, ``document`` (file and
    line) and ``rule``.

    Args:
        sections: of format text.
        out: a file that is there is replaced.
        progress: called with the number of documents read.

    Memory: some 60 bytes a document and 120 a pair, for what must not be repeated.

    Raises:
        DataError: a missing or damaged file, a bad record under ``error``, ``out`` is itself read, or not one pair.
        SaveError: the file cannot be written.
    """
    shards = [(section, raw) for section in sections for raw in list_shards(section.name, section.path)]
    _refuse_own_output(shards, out)
    tally = _Tally()
    with atomic_file(out) as file:
        for section, raw in shards:
            task = ShardTask("text", section.text_field, True, bad_records)
            for record in read_records(raw, [section.text_field]):
                sample = parse_sample(record, task)
                if isinstance(sample, Text):
                    for pair in _document_pairs(sample.text, settings, held_out, tally):
                        _write_pair(file, pair, section.name, record)
                    progress(tally.counts["documents"])
                    continue
                assert isinstance(sample, BadRecord)
                if bad_records == "error":
                    raise bad_record_error(record, sample)
                tally.counts["bad"] += 1
        counts = tally.counts
        found = BridgeCounts(
            documents=counts["documents"],
            bad=counts["bad"],
            repeated=counts["repeated"],
            held_out=counts["held_out"],
            pairs={rule: tally.pairs[rule] for rule in settings.rules},
            repeated_pairs=counts["repeated_pairs"],
            held_out_pairs=counts["held_out_pairs"],
        )
        if not found.num_pairs:
            raise DataError(_nothing_found(sections, found))
    return found


@dataclass(slots=True)
class _Tally:
    """What was counted so far, and the hashes of documents and of pairs that must not be repeated."""

    counts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    documents: set[int] = field(default_factory=set)
    said: set[int] = field(default_factory=set)


def _document_pairs(text: str, settings: BridgeSettings, held_out: HeldOutTexts, tally: _Tally) -> Iterator[BridgePair]:
    """The pairs of a document that are written: none where it is empty, repeated or held out."""
    if not text.strip():
        return
    counts = tally.counts
    counts["documents"] += 1
    key = text_hash(text)
    if key in held_out.hashes:
        counts["held_out"] += 1
    elif key in tally.documents:
        counts["repeated"] += 1
    else:
        tally.documents.add(key)
        for pair in bridge_pairs(text, settings):
            keys = {text_hash(pair.prompt), text_hash(f"{pair.rule}\n{pair.said}")}
            if any(held_out.holds(part) for part in (pair.evidence, pair.said, f"{pair.prompt}\n{pair.answer}")):
                counts["held_out_pairs"] += 1
            elif keys & tally.said:
                counts["repeated_pairs"] += 1
            else:
                tally.said |= keys
                tally.pairs[pair.rule] += 1
                yield pair


def _write_pair(file: BinaryIO, pair: BridgePair, source: str, record: Record) -> None:
    messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]
    document = f"{record.file.name}:{record.place}" if record.place else record.file.name
    value = {"messages": messages, "source": source, "document": document, "rule": pair.rule}
    file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")


def _refuse_own_output(shards: Sequence[tuple[SourceSection, RawShard]], out: Path) -> None:
    for section, raw in shards:
        if any(not file.is_remote and Path(file.path).resolve() == out.resolve() for file in raw.files):
            raise DataError(
                f"{out} is a file of the source {section.name}, which is read as text: give --out a file that no text "
                "source names, and remove that one if an earlier call wrote it."
            )


def _nothing_found(sections: Sequence[SourceSection], found: BridgeCounts) -> str:
    names = ", ".join(section.name for section in sections)
    counts = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in asdict(found).items() if key != "pairs")
    return (
        f"no pair was found in {names} ({counts}), so nothing was written. The rules need headings (Markdown, "
        "reStructuredText, numbered or in capitals) or paragraphs of whole sentences: look at the text, or lower "
        "--min-words."
    )

"""A source's first documents as training will see them, without writing a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsft.corpus.listing import list_shards
from dsft.corpus.prepare import Section, make_encoder, make_task
from dsft.corpus.samples import BadRecord
from dsft.corpus.shard import dropped_because, read_documents
from dsft.corpus.tokenizer import Tokenizer
from dsft.store.types import Document


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of equal weight: their text, the loss weight (0: not learned), and how many they are."""

    text: str
    weight: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Preview:
    """One record: its segments, or why it gives no document.

    Attributes:
        location: ``file:line``.
        segments: its text, cut where the loss weight changes.
        ids: its token ids.
        left_out: empty, or why training would not see it.
    """

    location: str
    segments: tuple[Segment, ...]
    ids: tuple[int, ...]
    left_out: str


def preview_source(section: Section, tokenizer: Tokenizer, num_records: int) -> Iterator[Preview]:
    """The first records of a source, in the listing's order. Raises DataError as ``prepare_sources`` does."""
    task, encoder = make_task(section, tokenizer, "skip"), make_encoder(section, tokenizer)
    left = num_records
    for raw in list_shards(section.name, section.path):
        for record, result in read_documents(raw, task, encoder, batch_samples=left):
            if isinstance(result, BadRecord):
                yield Preview(record.location, (), (), str(result))
            else:
                reason = (dropped_because(result) or "").replace("_", " ")
                yield Preview(record.location, tuple(segments(result, tokenizer)), tuple(result.ids.tolist()), reason)
            left -= 1
            if left == 0:
                return


def segments(document: Document, tokenizer: Tokenizer) -> Iterator[Segment]:
    """Cut a document where its loss weight changes. Token 0 is never predicted, so it is never learned."""
    num_tokens = len(document.ids)
    learned = zip(document.spans.tolist(), document.span_weights.tolist(), strict=True)
    borders = [(max(start, 1), end, weight) for (start, end), weight in learned]
    position = 0
    for start, end, weight in [*borders, (num_tokens, num_tokens, 0.0)]:
        for first, last, value in ((position, start, 0.0), (start, end, weight)):
            if first < last:
                yield Segment(tokenizer.decode_inside(document.ids, first, last), value, last - first)
        position = max(position, end)

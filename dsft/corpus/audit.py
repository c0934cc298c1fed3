"""What is wrong with a source, before anything is trained on it: one pass over all of its rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsft.config.evaluation import EvaluationSetSection
from dsft.config.models import AuditSection, DataSection
from dsft.corpus.listing import list_shards
from dsft.corpus.near_duplicates import (
    NUM_MINIMA,
    count_copies,
    minima,
    near_copies,
    ngram_hashes,
    shares_any,
    text_hash,
)
from dsft.corpus.prepare import Section, make_encoder, make_task
from dsft.corpus.samples import BadRecord, sample_text
from dsft.corpus.shard import dropped_because, parse_sample, read_documents, read_samples
from dsft.corpus.tokenizer import Tokenizer
from dsft.store.types import Document

_REASONS = 5
_BROKEN = re.compile("\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|[\u00c3\u00c2][\u0080-\u00bf]|\u00e2\u20ac")
"""Replacement characters, control characters, and UTF-8 that was read as Latin-1 or Windows-1252 (Ã©, â€™)."""


@dataclass(frozen=True, slots=True)
class SourceAudit:
    """Findings about one source. Counts are rows unless they say otherwise.

    Attributes:
        name: of the source.
        rows: all records.
        bad: not readable as this format.
        refused: read, but the chat template or the tokenizer does not keep what they say.
        empty: without text.
        unsupervised: with text, and no token to learn under the run's pack_tokens and overlong policy.
        end_of_turn_cut: their last learned token, the end of turn or of text, is cut off or dropped with the row.
        overlong: longer than a pack.
        duplicates: exactly an earlier row; near_duplicates: nearly one (MinHash).
        contaminated: held-out set -> rows that share a run of ``ngram_words`` words with it.
        broken_encoding: replacement or control characters, or text decoded with the wrong encoding.
        tokens, supervised_tokens: tokens, and those that are predicted and learned.
        lengths: upper bound in tokens (a power of two) -> rows up to it and above the bound before.
        reasons: why rows are bad or refused, the most frequent first: (reason, rows, first location).
    """

    name: str
    rows: int
    bad: int
    refused: int
    empty: int
    unsupervised: int
    end_of_turn_cut: int
    overlong: int
    duplicates: int
    near_duplicates: int
    contaminated: dict[str, int]
    broken_encoding: int
    tokens: int
    supervised_tokens: int
    lengths: dict[int, int]
    reasons: tuple[tuple[str, int, str], ...]

    @property
    def supervised_share(self) -> float:
        """Learned tokens over all tokens."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def share(self, count: int) -> float:
        """A count over all rows."""
        return count / self.rows if self.rows else 0.0


@dataclass(slots=True)
class _Tally:
    counts: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    hashes: list[int] = field(default_factory=list)
    signatures: list[npt.NDArray[np.uint32]] = field(default_factory=list)


def audit_source(
    section: Section,
    data: DataSection,
    tokenizer: Tokenizer,
    held_out: Mapping[str, npt.NDArray[np.uint64]],
    progress: Callable[[int], None],
) -> SourceAudit:
    """Read a whole source and count what is wrong with it. Memory: about 600 bytes a row.

    Args:
        data: pack_tokens, the overlong policy and the audit's settings.
        held_out: held-out set -> its n-grams, from :func:`held_out_ngrams`.
        progress: called with the number of rows now and then.

    Raises:
        DataError: a file that is missing or damaged.
    """
    tally, task, encoder = _Tally(), make_task(section, tokenizer, "skip"), make_encoder(section, tokenizer)
    for raw in list_shards(section.name, section.path):
        for record, result in read_documents(raw, task, encoder):
            tally.counts["rows"] += 1
            sample = parse_sample(record, task)
            if isinstance(sample, BadRecord) or isinstance(result, BadRecord):
                reason = _general(str(sample if isinstance(sample, BadRecord) else result))
                tally.counts["bad" if isinstance(sample, BadRecord) else "refused"] += 1
                tally.reasons[reason] += 1
                tally.places.setdefault(reason, record.location)
            if isinstance(result, Document):
                _count_document(tally, result, data)
            if not isinstance(sample, BadRecord):
                _count_text(tally, sample_text(sample), data.audit, held_out)
            progress(tally.counts["rows"])
    hashes = np.array(tally.hashes, dtype=np.int64)
    signatures = np.array(tally.signatures, dtype=np.uint32).reshape(-1, NUM_MINIMA)
    counts = tally.counts
    return SourceAudit(
        name=section.name,
        rows=counts["rows"],
        bad=counts["bad"],
        refused=counts["refused"],
        empty=counts["empty"],
        unsupervised=counts["unsupervised"],
        end_of_turn_cut=counts["end_of_turn_cut"],
        overlong=counts["overlong"],
        duplicates=count_copies(hashes),
        near_duplicates=int(near_copies(signatures, hashes, data.audit.near_duplicate_jaccard).sum()),
        contaminated={name: tally.contaminated[name] for name in held_out},
        broken_encoding=counts["broken_encoding"],
        tokens=counts["tokens"],
        supervised_tokens=counts["supervised_tokens"],
        lengths=dict(sorted(tally.lengths.items())),
        reasons=tuple((reason, count, tally.places[reason]) for reason, count in tally.reasons.most_common(_REASONS)),
    )


def held_out_ngrams(section: EvaluationSetSection, tokenizer: Tokenizer, num_words: int) -> npt.NDArray[np.uint64]:
    """All runs of ``num_words`` words of a held-out set, sorted hashes. Shorter texts have none."""
    task = make_task(section, tokenizer, "skip")
    grams = [np.zeros(0, dtype=np.uint64)]
    for raw in list_shards(section.name, section.path):
        for sample in read_samples(raw, task):
            grams.append(ngram_hashes(sample_text(sample), num_words))
    return np.unique(np.concatenate(grams))


def passed_limits(found: SourceAudit, limits: AuditSection) -> list[str]:
    """One line a limit of ``data.audit`` that the source passes."""
    shares = {
        "max_bad_share": found.share(found.bad),
        "max_refused_share": found.share(found.refused),
        "max_empty_share": found.share(found.empty),
        "max_unsupervised_share": found.share(found.unsupervised),
        "max_end_of_turn_cut_share": found.share(found.end_of_turn_cut),
        "max_duplicate_share": found.share(found.duplicates),
        "max_near_duplicate_share": found.share(found.near_duplicates),
        "max_contaminated_share": max((found.share(n) for n in found.contaminated.values()), default=0.0),
        "max_broken_encoding_share": found.share(found.broken_encoding),
    }
    passed = []
    for key, share in shares.items():
        limit = getattr(limits, key)
        if limit is not None and share > limit:
            passed.append(f"{found.name}: {share:.4%} is over data.audit.{key} ({limit:.4%})")
    if limits.min_supervised_share is not None and found.supervised_share < limits.min_supervised_share:
        passed.append(
            f"{found.name}: {found.supervised_share:.4%} of the tokens is supervised, under "
            f"data.audit.min_supervised_share ({limits.min_supervised_share:.4%})"
        )
    return passed


def _count_document(tally: _Tally, document: Document, data: DataSection) -> None:
    counts, num_tokens = tally.counts, len(document.ids)
    is_overlong = num_tokens > data.pack_tokens
    kept = num_tokens
    if is_overlong and data.overlong != "split":
        kept = data.pack_tokens if data.overlong == "truncate" else 0
    starts, ends = np.maximum(document.spans[:, 0], 1), document.spans[:, 1]
    learned = int(np.clip(np.minimum(ends, kept) - starts, 0, None).sum())
    counts["tokens"] += num_tokens
    counts["supervised_tokens"] += learned
    counts["overlong"] += is_overlong
    tally.lengths[1 << max(num_tokens - 1, 0).bit_length()] += 1
    if dropped_because(document) == "without_text":
        counts["empty"] += 1
    elif not learned:
        counts["unsupervised"] += 1
    if len(ends) and int(ends[-1]) > kept:
        counts["end_of_turn_cut"] += 1


def _count_text(
    tally: _Tally, text: str, settings: AuditSection, held_out: Mapping[str, npt.NDArray[np.uint64]]
) -> None:
    tally.counts["broken_encoding"] += _BROKEN.search(text) is not None
    if not text.strip():
        return
    tally.hashes.append(text_hash(text))
    tally.signatures.append(minima(text))
    grams = ngram_hashes(text, settings.ngram_words)
    for name, known in held_out.items():
        tally.contaminated[name] += shares_any(grams, known)


def _general(reason: str) -> str:
    """A reason without what is different in each row: numbers and quoted text."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", reason))

"""What pairs look like: how different the answers are, whether prompts have several, whether the text holds them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsft.advise.split import prompt_and_answer, samples
from dsft.config.models import SourceSection
from dsft.corpus.near_duplicates import SHINGLE_WORDS, ngram_hashes, text_hash
from dsft.corpus.samples import BadRecord, Text

_COMMON = 20
_MAX_ANSWERS = 20_000
"""Answers that are looked for in the text: the share is known to 1 % from that many."""


@dataclass(frozen=True, slots=True)
class PairShapes:
    """Shares as ``PairsEvidence`` describes them."""

    conflicting_share: float
    distinct_answer_share: float
    common_answer_share: float
    found_in_text_share: float | None


def pair_shapes(pairs: SourceSection, text: SourceSection | None) -> PairShapes:
    """Read all pairs, and the text once if there is one."""
    answers_of: dict[int, set[int]] = {}
    frequency: Counter[int] = Counter()
    runs: list[npt.NDArray[np.uint64]] = []
    for _, sample in samples(pairs):
        pair = None if isinstance(sample, BadRecord) else prompt_and_answer(sample)
        if pair is None:
            continue
        answer = text_hash(pair[1])
        answers_of.setdefault(text_hash(pair[0]), set()).add(answer)
        frequency[answer] += 1
        if len(runs) < _MAX_ANSWERS and len(found := ngram_hashes(pair[1], SHINGLE_WORDS)):
            runs.append(found)
    num_pairs = max(frequency.total(), 1)
    return PairShapes(
        conflicting_share=sum(len(found) > 1 for found in answers_of.values()) / max(len(answers_of), 1),
        distinct_answer_share=len(frequency) / num_pairs,
        common_answer_share=sum(count for _, count in frequency.most_common(_COMMON)) / num_pairs,
        found_in_text_share=None if text is None or not runs else _found_share(runs, text),
    )


def _found_share(runs: list[npt.NDArray[np.uint64]], text: SourceSection) -> float:
    """Share of the answers of which half or more of the five-word runs stand in the text."""
    wanted = np.unique(np.concatenate(runs))
    found = np.zeros(len(wanted), dtype=np.bool_)
    for _, sample in samples(text):
        if isinstance(sample, Text):
            hashes = ngram_hashes(sample.text, SHINGLE_WORDS)
            at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            found[at[wanted[at] == hashes]] = True
    return float(np.mean([found[np.searchsorted(wanted, one)].mean() >= 0.5 for one in runs]))

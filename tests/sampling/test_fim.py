"""Fill-in-the-middle: nothing is lost, the planned length is exact, rates and cuts are those of the paper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.sampling.fim import NUM_SENTINELS, FillInTheMiddle, FimOrder, fim_order
from dsft.sampling.types import PlannedSource

PRE, SUF, MID, BOS, EOS = 1, 2, 3, 4, 5
FIRST_WORD = 10


def order(rate: float = 0.5, spm_rate: float = 0.5, leading: int = 1, trailing: int = 1, seed: int = 7) -> FimOrder:
    return fim_order(FillInTheMiddle(rate, spm_rate, PRE, SUF, MID, leading, trailing), seed, "code")


def stored(num_words: int, leading: int = 1, trailing: int = 1) -> np.ndarray:
    words = np.arange(FIRST_WORD, FIRST_WORD + num_words)
    return np.concatenate([[BOS] * leading, words, [EOS] * trailing]).astype(np.int32)


def restored(ids: list[int]) -> tuple[list[int], bool]:
    """The document before it was rearranged, by the layouts in the paper; and whether it was SPM."""
    pre, suf, mid = ids.index(PRE), ids.index(SUF), ids.index(MID)
    prefix, suffix, middle = ids[pre + 1 : suf], ids[suf + 1 : mid], ids[mid + 1 :]
    end = []
    while middle and middle[-1] == EOS:
        end.append(middle.pop())
    return ids[:pre] + prefix + middle + suffix + end, not prefix and bool(suffix)


@settings(max_examples=200, deadline=None)
@given(
    num_words=st.integers(0, 40), leading=st.integers(0, 2), trailing=st.integers(0, 2),
    rate=st.sampled_from([0.0, 0.5, 1.0]), epoch=st.integers(0, 3),
    shard=st.integers(0, 1000), document=st.integers(0, 50),
)  # fmt: skip
def test_every_token_is_there_once_and_the_planned_length_is_exact(
    num_words: int, leading: int, trailing: int, rate: float, epoch: int, shard: int, document: int
) -> None:
    rule, ids = order(rate, 0.5, leading, trailing), stored(num_words, leading, trailing)
    found, spans = rule.rearrange(epoch, shard, document, ids)
    lengths = np.full(document + 1, len(ids), dtype=np.int32)
    assert len(found) == rule.planned(epoch, shard, lengths)[document]
    learned = sorted(position for start, end in spans.tolist() for position in range(start, end))
    assert learned == [at for at, token in enumerate(found.tolist()) if token not in (PRE, SUF, MID)]
    if len(found) == len(ids):
        assert found.tolist() == ids.tolist()
        assert rate < 1 or num_words == 0
    else:
        assert len(found) == len(ids) + NUM_SENTINELS
        assert restored(found.tolist())[0] == ids.tolist()


def test_rates_and_cuts() -> None:
    num_documents, num_words = 20_000, 100
    rule, ids = order(0.3, 0.25), stored(num_words)
    chosen = rule.planned(0, 3, np.full(num_documents, len(ids), np.int32)) > len(ids)
    assert chosen.mean() == pytest.approx(0.3, abs=0.013)  # four standard deviations
    spm, middles = [], []
    for document in np.flatnonzero(chosen).tolist():
        found = rule.rearrange(0, 3, document, ids)[0].tolist()
        spm.append(restored(found)[1])
        prefix = found[found.index(PRE) + 1 : found.index(SUF)]
        if prefix:
            middles.append(len(found) - 2 - found.index(MID))
    assert np.mean(spm) == pytest.approx(0.25, abs=0.025)
    # Two uniform cuts leave a third of the document between them (the empty prefixes left out are two in a hundred).
    assert np.mean(middles) == pytest.approx(num_words / 3, abs=1.5)


def test_spm_is_the_papers_variant() -> None:
    rule = order(1.0, 1.0, 0, 1)
    found = rule.rearrange(0, 0, 0, stored(6, 0, 1))[0].tolist()
    assert found[:2] == [PRE, SUF]
    assert found[-1] == EOS


def test_epochs_shards_seeds_and_names_cut_anew() -> None:
    lengths = np.full(200, 50, np.int32)
    rule = order()
    base = rule.planned(0, 0, lengths)
    assert np.array_equal(base, order().planned(0, 0, lengths))
    others = [
        rule.planned(1, 0, lengths),
        rule.planned(0, 1, lengths),
        order(seed=8).planned(0, 0, lengths),
        fim_order(rule.objective, 7, "other").planned(0, 0, lengths),
    ]
    for other in others:
        assert 60 < (base != other).sum() < 140


def test_a_source_has_the_lengths_of_its_epoch() -> None:
    lengths = np.full(30, 50, np.int32)
    rule = order()
    source = PlannedSource("code", 1, lambda shard: lengths, rule)
    assert np.array_equal(source.lengths_in(2, 0), rule.planned(2, 0, lengths))
    assert np.array_equal(PlannedSource("code", 1, lambda shard: lengths).lengths_in(2, 0), lengths)

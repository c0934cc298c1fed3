from __future__ import annotations

import numpy as np
import pytest

from dsft.sampling.mlm import MaskedLanguageModelling, MlmOrder, mlm_order
from dsft.sampling.objectives import objective_from_json

MASK, SPECIAL, VOCAB = 4, (0, 1, 2, 3, 4, 50), 200


def order(
    rate: float = 0.15, mask: float = 0.8, random: float = 0.1, pack_tokens: int = 10**6, seed: int = 7
) -> MlmOrder:
    return mlm_order(MaskedLanguageModelling(rate, mask, random, MASK, SPECIAL, VOCAB, pack_tokens), seed, "docs")


def document(length: int = 200_000) -> np.ndarray:
    ids = np.random.default_rng(3).integers(0, VOCAB, length).astype(np.int32)
    ids[[0, -1]] = 2, 3
    return ids


def test_shares_are_those_of_the_paper_and_special_tokens_stay() -> None:
    ids = document()
    given, spans = order().rearrange(0, 0, 0, ids)
    chosen = spans[:, 0]
    np.testing.assert_array_equal(spans[:, 1], chosen + 1)
    assert not np.isin(ids[chosen], SPECIAL).any()
    others = np.setdiff1d(np.arange(len(ids)), chosen)
    np.testing.assert_array_equal(given[others], ids[others])
    words = np.flatnonzero(~np.isin(ids, SPECIAL))
    masked, kept = given[chosen] == MASK, given[chosen] == ids[chosen]
    replaced = given[chosen][~masked & ~kept]
    n = len(chosen)
    # Each within five standard deviations of a binomial share.
    for share, expected, of in [
        (n / len(words), 0.15, len(words)),
        (masked.mean(), 0.8, n),
        (kept.mean(), 0.1 + 0.1 / (VOCAB - len(SPECIAL)), n),
    ]:
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / of)
    assert not np.isin(replaced, SPECIAL).any()
    assert set(replaced.tolist()) == set(range(VOCAB)) - set(SPECIAL), "every word can be put in"


def test_a_function_of_seed_source_epoch_shard_and_document() -> None:
    ids = document(500)
    rule = order()
    first = rule.rearrange(1, 2, 3, ids)
    for left, right in zip(first, order().rearrange(1, 2, 3, ids), strict=True):
        np.testing.assert_array_equal(left, right)
    others = [rule.rearrange(*place, ids) for place in ((0, 2, 3), (1, 0, 3), (1, 2, 0))]
    others += [order(seed=8).rearrange(1, 2, 3, ids), mlm_order(rule.objective, 7, "more").rearrange(1, 2, 3, ids)]
    assert all(not np.array_equal(first[0], other[0]) for other in others)
    assert ids is not first[0]
    assert rule.planned(0, 0, np.array([3, 4], np.int32)).tolist() == [3, 4]


@pytest.mark.parametrize("pack_tokens", [1, 7, 64])
def test_the_first_token_of_a_part_is_never_chosen(pack_tokens: int) -> None:
    _, spans = order(rate=1.0, pack_tokens=pack_tokens).rearrange(0, 0, 0, document(1000))
    assert (spans[:, 0] % pack_tokens != 0).all()
    assert len(spans) == 0 if pack_tokens == 1 else len(spans) > 0


def test_extremes() -> None:
    ids = document(1000)
    assert (order(1.0, 0.0, 0.0).rearrange(0, 0, 0, ids)[0] == ids).all()
    given, spans = order(1.0, 1.0, 0.0).rearrange(0, 0, 0, ids)
    assert (given[spans[:, 0]] == MASK).all()
    given, spans = order(1.0, 0.0, 1.0).rearrange(0, 0, 0, ids)
    assert MASK not in given[spans[:, 0]]
    assert len(order().rearrange(0, 0, 0, ids[:0])[1]) == 0


def test_it_comes_back_from_a_log() -> None:
    rule = order().objective
    fields = {name: getattr(rule, name) for name in MaskedLanguageModelling.__slots__}
    assert objective_from_json({**fields, "special_ids": list(SPECIAL)}) == rule

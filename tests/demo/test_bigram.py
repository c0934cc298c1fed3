import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

from dsft.demo.bigram import bits_per_byte
from tests.support.stores import text_document, write_store

TRAIN = [[1, 2, 3, 1, 2], [2], [3, 3, 3, 1], [4, 1, 2, 3]]
HELD_OUT = [[1, 2, 3, 3], [0, 4], [5]]
VOCAB_TOKENS = 6


def naive_bits_per_byte(vocab_tokens: int) -> float:
    pairs = Counter(pair for ids in TRAIN for pair in itertools.pairwise(ids))
    contexts = Counter(token for ids in TRAIN for token in ids[:-1])
    bits = 0.0
    for ids in HELD_OUT:
        for pair in itertools.pairwise(ids):
            bits -= math.log2((pairs[pair] + 1) / (contexts[pair[0]] + vocab_tokens))
    return bits / sum(4 * len(ids) for ids in HELD_OUT)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_against_counting_by_hand(tmp_path: Path, num_shards: int) -> None:
    train = write_store(tmp_path / "t", [text_document(ids) for ids in TRAIN], num_shards=num_shards)
    held_out = write_store(tmp_path / "h", [text_document(ids) for ids in HELD_OUT], num_shards=num_shards)
    assert bits_per_byte(train, held_out, VOCAB_TOKENS) == pytest.approx(naive_bits_per_byte(VOCAB_TOKENS), rel=1e-12)

"""An add-one-smoothed bigram model over token stores: the baseline that a trained model must beat.

p(next | token) = (count(token, next) + 1) / (count(token) + V), Laplace's rule (Jurafsky and Martin, "Speech and
Language Processing", 3rd edition, section 3.6), with counts over all training documents, and V the vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsft.store.reader import SourceStore


def bits_per_byte(train: SourceStore, held_out: SourceStore, vocab_tokens: int) -> float:
    """Held-out bits per byte of the bigram model of ``train``.

    The targets are those of a language model: every token of a document but its first. The bytes are those of the whole
    text, as in ``dsft.evaluate``.
    """
    pairs, counts = np.unique(_all_pairs(train, vocab_tokens), return_counts=True)
    context_counts = np.bincount(pairs // vocab_tokens, weights=counts, minlength=vocab_tokens)
    targets = _all_pairs(held_out, vocab_tokens)
    where = np.minimum(np.searchsorted(pairs, targets), len(pairs) - 1)
    target_counts = np.where(pairs[where] == targets, counts[where], 0)
    bits = np.log2(context_counts[targets // vocab_tokens] + vocab_tokens) - np.log2(target_counts + 1.0)
    num_bytes = sum(int(held_out.index(shard).num_bytes.sum()) for shard in range(held_out.num_shards))
    return float(bits.sum() / num_bytes)


def _all_pairs(store: SourceStore, vocab_tokens: int) -> npt.NDArray[np.int64]:
    """int64[n]: ``token * V + next`` for every two neighbours inside a document, all shards."""
    return np.concatenate([_pairs(store, shard, vocab_tokens) for shard in range(store.num_shards)])


def _pairs(store: SourceStore, shard: int, vocab_tokens: int) -> npt.NDArray[np.int64]:
    index = store.index(shard)
    tokens = store.tokens(shard).astype(np.int64)
    pairs = tokens[:-1] * vocab_tokens + tokens[1:]
    inside = np.ones(len(pairs), dtype=bool)
    last_tokens = np.cumsum(index.lengths, dtype=np.int64)[:-1] - 1
    inside[last_tokens] = False  # its next token belongs to another document
    return pairs[inside]

"""Masked language modelling: a share of the tokens is hidden, and an encoder learns what stood there.

Devlin et al., "BERT" (arXiv:1810.04805, section 3.1): a token is chosen with probability ``rate``; of the chosen ones a
share ``mask_share`` becomes the mask token, ``random_share`` a random token, the others stay. Special tokens are never
chosen, and never put in place of a word. What is chosen, and what becomes of it, is a function of (seed, source, epoch,
shard, document, position), so each epoch hides other tokens, and any position is reached at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsft.sampling.permutation import derive_key, mix64, stream_key

_NUM_DRAWS = 3  # chosen at all, what becomes of it, and the random token
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class MaskedLanguageModelling:
    """The objective of one source.

    Attributes:
        rate: probability that a token is chosen.
        mask_share, random_share: shares of the chosen tokens that become the mask token, or a random one.
        mask_id: the mask token.
        special_ids: ascending; tokens that are never chosen and never put in.
        vocab_tokens: ids are below it.
        pack_tokens: documents are cut after so many tokens; the first token of each part is never chosen, because rows
            are laid out for the token before (it is a special token in all but cut documents, for BERT's tokenizers).
    """

    rate: float
    mask_share: float
    random_share: float
    mask_id: int
    special_ids: tuple[int, ...]
    vocab_tokens: int
    pack_tokens: int


@dataclass(frozen=True, slots=True)
class MlmOrder:
    """Which tokens of a source are hidden in which epoch.

    Attributes:
        objective: rates and tokens.
        key: 64-bit key of the source's stream, see :func:`mlm_order`.
        is_special: bool[vocab_tokens].
        words: int32, the tokens that may be put in.
    """

    objective: MaskedLanguageModelling
    key: int
    is_special: npt.NDArray[np.bool_]
    words: npt.NDArray[np.int32]

    def planned(self, epoch: int, shard: int, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Tokens of each document in an epoch, int32[N]: as stored."""
        return lengths

    def rearrange(
        self, epoch: int, shard: int, document: int, ids: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """A document as this epoch trains on it.

        Args:
            ids: int32[n], the stored tokens.

        Returns:
            What the model is given (int32[n]), and the chosen positions as spans of one token (int64[K, 2]).
        """
        rule = self.objective
        positions = np.arange(len(ids), dtype=np.uint64)
        key = np.uint64(derive_key(self.key, epoch, shard, document))
        numbers = positions * np.uint64(_NUM_DRAWS) + np.arange(1, _NUM_DRAWS + 1, dtype=np.uint64)[:, None]
        chosen, kind, word = (mix64(key + _GOLDEN * numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        hidden = (chosen < rule.rate) & ~self.is_special[ids] & (positions % np.uint64(rule.pack_tokens) != 0)
        given = ids.copy()
        given[hidden & (kind < rule.mask_share)] = rule.mask_id
        random = hidden & (kind >= rule.mask_share) & (kind < rule.mask_share + rule.random_share)
        given[random] = self.words[(word[random] * len(self.words)).astype(np.int64)]
        first = np.flatnonzero(hidden)
        return given, np.stack([first, first + 1], axis=1)


def mlm_order(objective: MaskedLanguageModelling, seed: int, source_name: str, purpose: str = "mlm") -> MlmOrder:
    """The objective of a source in a run. ``purpose`` separates held-out sets from sources of the same name."""
    is_special = np.zeros(objective.vocab_tokens, dtype=np.bool_)
    is_special[list(objective.special_ids)] = True
    words = np.flatnonzero(~is_special).astype(np.int32)
    return MlmOrder(objective, stream_key(seed, purpose, source_name), is_special, words)

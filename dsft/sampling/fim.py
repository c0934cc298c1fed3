"""Fill-in-the-middle: a share of the documents is rearranged so that the model learns to write what is missing.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (arXiv:2207.14255): a document is cut at
two random places into prefix, middle and suffix, and put together again with sentinels, as PSM

    <PRE> prefix <SUF> suffix <MID> middle

or, in a share of the cases, as SPM (the paper's variant, which keeps the sentinels' order the same)

    <PRE> <SUF> suffix <MID> prefix middle

The loss is on all of it but the sentinels. Unlike the paper, which cuts between characters, dsft cuts between tokens:
the plan knows lengths only, and a cut between characters would change them. Whether and where a document is cut is a
function of (seed, source, epoch, shard, document), so each epoch cuts anew, and any position is reached at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsft.sampling.permutation import derive_key, mix64, stream_key

NUM_SENTINELS = 3
"""Tokens that a rearranged document is longer by."""

_NUM_DRAWS = 4  # rearranged at all, SPM, and the two cuts
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """The objective of one source.

    Attributes:
        rate: share of the documents that are rearranged.
        spm_rate: share of these that are laid out as SPM.
        prefix_id, suffix_id, middle_id: the sentinels.
        num_leading, num_trailing: tokens that the tokenizer puts before and after a text (BOS, EOS); they stay there.
    """

    rate: float
    spm_rate: float
    prefix_id: int
    suffix_id: int
    middle_id: int
    num_leading: int
    num_trailing: int


@dataclass(frozen=True, slots=True)
class FimOrder:
    """Which documents of a source are rearranged in which epoch, and how.

    Attributes:
        objective: rates and sentinels.
        key: 64-bit key of the source's stream, see :func:`fim_order`.
    """

    objective: FillInTheMiddle
    key: int

    def planned(self, epoch: int, shard: int, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Tokens of each document of a shard in an epoch, int32[N]: as stored, and the sentinels."""
        chosen = self._draws(epoch, shard, np.arange(len(lengths), dtype=np.uint64))[0] < self.objective.rate
        chosen &= lengths > self.objective.num_leading + self.objective.num_trailing
        return lengths + np.where(chosen, np.int32(NUM_SENTINELS), np.int32(0))

    def rearrange(
        self, epoch: int, shard: int, document: int, ids: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """A document as this epoch trains on it.

        Args:
            ids: int32[n], the stored tokens.

        Returns:
            Its tokens (int32[n], or int32[n + 3]) and its supervised targets as spans (int64[K, 2]).
        """
        rule = self.objective
        chosen, spm, *cuts = self._draws(epoch, shard, np.array([document], dtype=np.uint64))[:, 0].tolist()
        begin, end = rule.num_leading, len(ids) - rule.num_trailing
        if chosen >= rule.rate or begin >= end:
            return ids, np.array([[0, len(ids)]], dtype=np.int64)
        first, second = sorted(begin + int(cut * (end - begin + 1)) for cut in cuts)
        prefix, middle, suffix = ids[begin:first], ids[first:second], ids[second:end]
        pre, suf, mid = (
            np.array([token], dtype=np.int32) for token in (rule.prefix_id, rule.suffix_id, rule.middle_id)
        )
        none = ids[:0]
        parts = (none, suffix, prefix, middle) if spm < rule.spm_rate else (prefix, suffix, none, middle)
        rearranged = np.concatenate([ids[:begin], pre, parts[0], suf, parts[1], mid, parts[2], parts[3], ids[end:]])
        sentinels = begin + np.cumsum([0, len(parts[0]) + 1, len(parts[1]) + 1])
        borders = np.concatenate([[-1], sentinels, [len(rearranged)]])
        spans = np.stack([borders[:-1] + 1, borders[1:]], axis=1)
        return rearranged, spans[spans[:, 0] < spans[:, 1]]

    def _draws(self, epoch: int, shard: int, documents: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
        """float64[4, N] in [0, 1): splitmix64 over the document numbers."""
        base = np.uint64(derive_key(self.key, epoch, shard))
        numbers = documents * np.uint64(_NUM_DRAWS) + np.arange(_NUM_DRAWS, dtype=np.uint64)[:, None]
        bits = mix64(base + _GOLDEN * (numbers + np.uint64(1)))
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fim_order(objective: FillInTheMiddle, seed: int, source_name: str) -> FimOrder:
    """The objective of a source in a run."""
    return FimOrder(objective, stream_key(seed, "fim", source_name))

"""Counts how often a plan uses each document: the proof that every pass over a source takes each of them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsft.sampling.types import Pieces


@dataclass(frozen=True, slots=True)
class EpochUsage:
    """What was used of one pass over a source.

    Attributes:
        source: position in the configuration.
        epoch: from 0.
        num_documents: documents used whole, exactly once.
        num_partly_used: documents of which some pieces were used (the others come in later steps).
        num_tokens: tokens used.
        is_complete: every document of the source was used whole, exactly once (those the overlong policy drops apart).
    """

    source: int
    epoch: int
    num_documents: int
    num_partly_used: int
    num_tokens: int
    is_complete: bool


class Usage:
    """Adds up the pieces of a plan, step after step.

    Memory: 4 bytes a document for every pass that is not complete; a complete pass is only counted.

    Args:
        planned: (source, epoch, shard) -> int32[N], tokens of each document as planned; 0: not used.
        num_shards: (source, epoch) -> shards of that pass.
    """

    def __init__(
        self, planned: Callable[[int, int, int], npt.NDArray[np.int32]], num_shards: Callable[[int, int], int]
    ) -> None:
        self._planned = planned
        self._num_shards = num_shards
        self._open: dict[tuple[int, int], dict[int, npt.NDArray[np.int32]]] = {}
        self._tokens: dict[tuple[int, int], int] = {}
        self._complete: dict[tuple[int, int], EpochUsage] = {}
        self._all: dict[tuple[int, int], tuple[int, int]] = {}

    def add(self, pieces: Pieces) -> list[str]:
        """Count the pieces of one step; returns one line for each document that is used more than once in a pass."""
        repeats = []
        keys = np.stack([pieces.source, pieces.epoch, pieces.shard])
        groups, group_of = np.unique(keys, axis=1, return_inverse=True)
        for number, (source, epoch, shard) in enumerate(groups.T.tolist()):
            rows = np.flatnonzero(group_of.reshape(-1) == number)
            documents, length = pieces.document[rows], pieces.length[rows]
            if (source, epoch) in self._complete:
                repeats.append(_repeat(source, epoch, shard, int(documents[0])))
                continue
            planned = self._planned(source, epoch, shard)
            shards = self._open.setdefault((source, epoch), {})
            used = shards.setdefault(shard, np.zeros(len(planned), np.int32))
            np.add.at(used, documents, length)
            repeats += [
                _repeat(source, epoch, shard, document)
                for document in np.unique(documents[used[documents] > planned[documents]]).tolist()
            ]
            self._tokens[source, epoch] = self._tokens.get((source, epoch), 0) + int(length.sum(dtype=np.int64))
        for source, epoch in {(source, epoch) for source, epoch, _ in groups.T.tolist()} & self._open.keys():
            num_documents, num_tokens = self._whole_pass(source, epoch)
            if not repeats and self._tokens[source, epoch] == num_tokens:
                self._complete[source, epoch] = EpochUsage(source, epoch, num_documents, 0, num_tokens, True)
                del self._open[source, epoch]
        return repeats

    def epochs(self) -> list[EpochUsage]:
        """All passes seen so far, by source and epoch."""
        found = dict(self._complete)
        for (source, epoch), shards in self._open.items():
            whole = partly = 0
            for shard, used in shards.items():
                planned = self._planned(source, epoch, shard)
                whole += int(((used == planned) & (used > 0)).sum())
                partly += int(((used != planned) & (used > 0)).sum())
            found[source, epoch] = EpochUsage(source, epoch, whole, partly, self._tokens[source, epoch], False)
        return [found[key] for key in sorted(found)]

    def documents_of_pass(self, source: int, epoch: int) -> int:
        """Documents that one whole pass over a source uses."""
        return self._whole_pass(source, epoch)[0]

    def _whole_pass(self, source: int, epoch: int) -> tuple[int, int]:
        """Documents and tokens of one whole pass."""
        if (source, epoch) not in self._all:
            columns = [self._planned(source, epoch, shard) for shard in range(self._num_shards(source, epoch))]
            documents = sum(int((column > 0).sum()) for column in columns)
            self._all[source, epoch] = documents, sum(int(column.sum(dtype=np.int64)) for column in columns)
        return self._all[source, epoch]


def _repeat(source: int, epoch: int, shard: int, document: int) -> str:
    return f"document {document} of shard {shard} of source {source} is used more than once in epoch {epoch}"

"""The order of the documents of one source.

Per epoch: the shards are permuted; consecutive ``group_shards`` of them form a group; the documents of a group are
permuted among themselves. Every step is a keyed permutation of (seed, source name, epoch, group), so any position is
reached at once, and nothing depends on a source's total of documents or tokens: training can start while later shards
are still raw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsft.errors import DataError
from dsft.ops import backend, planning
from dsft.ops.planning import DocumentColumns
from dsft.sampling.packing import Overlong, planned_lengths
from dsft.sampling.permutation import Permutation, derive_key, stream_key
from dsft.sampling.types import PlannedSource

CHUNK_DOCUMENTS = 8192
"""Documents read from the order at once; the arrays of a chunk stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class DocumentChunk:
    """Consecutive documents of a source's order that the overlong policy keeps. Columns of equal length, never empty.

    Attributes:
        epoch, group: where all of them lie.
        ordinal: int64, place in the shuffled group.
        shard: int32; document: int64, number inside its shard.
        length: int32, tokens (with this epoch's sentinels); planned: int32, tokens after the overlong policy (>= 1).
        dropped: int64, documents the policy dropped since the document before; dropped_tokens: int64, their tokens.
    """

    epoch: int
    group: int
    ordinal: npt.NDArray[np.int64]
    shard: npt.NDArray[np.int32]
    document: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    planned: npt.NDArray[np.int32]
    dropped: npt.NDArray[np.int64]
    dropped_tokens: npt.NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """Documents in the chunk."""
        return len(self.ordinal)


@dataclass(frozen=True, slots=True)
class _Group:
    """Lengths of a group's shards, one after the other, and the permutation of its documents."""

    epoch: int
    group: int
    shards: npt.NDArray[np.int64]
    first_documents: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    permutation: Permutation

    def read(self, begin: int, end: int, pack_tokens: int, overlong: Overlong) -> tuple[DocumentColumns, int, int]:
        """The kept documents of ``[begin, end)``; documents and tokens dropped behind the last of them."""
        if backend.current() == "reference":
            return self.read_reference(begin, end, pack_tokens, overlong)
        permutation = (self.permutation.size, self.permutation.base, self.permutation.round_keys)
        return planning.read_documents(
            permutation, begin, end, self.lengths, self.first_documents, self.shards, pack_tokens, overlong
        )

    def read_reference(
        self, begin: int, end: int, pack_tokens: int, overlong: Overlong
    ) -> tuple[DocumentColumns, int, int]:
        """As :meth:`read`, in numpy."""
        ordinal = np.arange(begin, end, dtype=np.int64)
        flat = self.permutation.permute_reference(ordinal)
        length = self.lengths[flat]
        planned = planned_lengths(length, pack_tokens, overlong)
        kept = np.flatnonzero(planned)
        lost_tokens = np.cumsum(np.where(planned == 0, length, 0), dtype=np.int64)
        last, last_tokens = (int(kept[-1]), int(lost_tokens[kept[-1]])) if kept.size else (-1, 0)
        flat = flat[kept]
        which = np.searchsorted(self.first_documents, flat, side="right") - 1
        columns = (
            ordinal[kept],
            self.shards[which].astype(np.int32),
            flat - self.first_documents[which],
            length[kept],
            planned[kept],
            np.diff(kept, prepend=-1) - 1,
            np.diff(lost_tokens[kept], prepend=0),
        )
        return columns, end - begin - 1 - last, int(lost_tokens[-1]) - last_tokens


class SourceOrder:
    """Reads one source's documents in order, from any position. Holds the lengths of one group.

    Args:
        source: name, number of shards, lengths.
        seed: the run's seed.
        group_shards: shards whose documents are shuffled together.
        pack_tokens, overlong: decide which documents are dropped, and how long the others are.
    """

    def __init__(
        self, source: PlannedSource, *, seed: int, group_shards: int, pack_tokens: int, overlong: Overlong
    ) -> None:
        self.source = source
        self._group_shards = group_shards
        self._pack_tokens = pack_tokens
        self._overlong: Overlong = overlong
        self._shard_key = stream_key(seed, "shards", source.name)
        self._document_key = stream_key(seed, "documents", source.name)
        self._loaded: _Group | None = None

    def read(self, epoch: int, group: int, ordinal: int) -> DocumentChunk:
        """The next documents at or after a position, all of one group; crosses into later groups and epochs.

        Raises:
            DataError: a whole epoch of the source yields no document.
        """
        first_epoch = epoch
        dropped = dropped_tokens = 0
        while True:
            if group >= self._num_groups(epoch):
                epoch, group, ordinal = epoch + 1, 0, 0
                if epoch > first_epoch + 1 or self.source.num_shards == 0:
                    raise self._no_document_error(dropped)
            loaded = self._load(epoch, group)
            num_documents = len(loaded.lengths)
            if ordinal >= num_documents:
                group, ordinal = group + 1, 0
                continue
            end = min(ordinal + CHUNK_DOCUMENTS, num_documents)
            chunk, lost, lost_tokens = self._chunk(loaded, ordinal, end, dropped, dropped_tokens)
            if chunk is not None:
                return chunk
            ordinal, dropped, dropped_tokens = end, dropped + lost, dropped_tokens + lost_tokens

    def shards_of_group(self, epoch: int, group: int) -> npt.NDArray[np.int64]:
        """Numbers of the shards of a group, in the epoch's order."""
        num_shards = self.source.num_shards_in(epoch)
        begin = group * self._group_shards
        end = min(begin + self._group_shards, num_shards)
        permutation = Permutation(num_shards, derive_key(self._shard_key, epoch))
        return permutation(np.arange(begin, end, dtype=np.int64))

    def documents_at(
        self, epoch: int, group: int, ordinals: npt.NDArray[np.int64], num_documents: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which documents stand at some places of a group, from the shards' counts alone: no length is read.

        Args:
            ordinals: int64[N], places in the shuffled group, below its number of documents.
            num_documents: int64[num_shards], documents of every shard of the source.

        Returns:
            (shard, document) int64[N]; documents that the overlong policy drops are among them.
        """
        shards = self.shards_of_group(epoch, group)
        ends = np.cumsum(num_documents[shards])
        flat = self._document_permutation(epoch, group, int(ends[-1]))(ordinals)
        which = np.searchsorted(ends, flat, side="right")
        return shards[which], flat - (ends - num_documents[shards])[which]

    def _num_groups(self, epoch: int) -> int:
        return -(-self.source.num_shards_in(epoch) // self._group_shards)

    def _chunk(
        self, loaded: _Group, begin: int, end: int, dropped_before: int, dropped_tokens_before: int
    ) -> tuple[DocumentChunk | None, int, int]:
        """The kept documents of ``[begin, end)`` of a group (None if there is none), documents and tokens dropped."""
        columns, rest, rest_tokens = loaded.read(begin, end, self._pack_tokens, self._overlong)
        ordinal, shard, document, length, planned, dropped, dropped_tokens = columns
        if not ordinal.size:
            return None, rest, rest_tokens
        dropped[0] += dropped_before
        dropped_tokens[0] += dropped_tokens_before
        chunk = DocumentChunk(
            epoch=loaded.epoch,
            group=loaded.group,
            ordinal=ordinal,
            shard=shard,
            document=document,
            length=length,
            planned=planned,
            dropped=dropped,
            dropped_tokens=dropped_tokens,
        )
        return chunk, 0, 0  # what is dropped behind its last document is read again with the next chunk

    def _load(self, epoch: int, group: int) -> _Group:
        if self._loaded is None or (self._loaded.epoch, self._loaded.group) != (epoch, group):
            shards = self.shards_of_group(epoch, group)
            if self.source.will_need is not None:
                after = (epoch, group + 1) if group + 1 < self._num_groups(epoch) else (epoch + 1, 0)
                self.source.will_need([*shards.tolist(), *self.shards_of_group(*after).tolist()])
            lengths = [self.source.lengths_in(epoch, int(shard)) for shard in shards]
            counts = np.array([len(column) for column in lengths], dtype=np.int64)
            self._loaded = _Group(
                epoch=epoch,
                group=group,
                shards=shards,
                first_documents=np.cumsum(counts) - counts,
                lengths=np.concatenate(lengths),
                permutation=self._document_permutation(epoch, group, int(counts.sum())),
            )
        return self._loaded

    def _document_permutation(self, epoch: int, group: int, num_documents: int) -> Permutation:
        return Permutation(num_documents, derive_key(self._document_key, epoch, group))

    def _no_document_error(self, dropped: int) -> DataError:
        if dropped == 0:
            return DataError(
                f"source {self.source.name!r} has no document in any of its {self.source.num_shards} shards, but the "
                "mixture draws from it. Check data.sources path and format, or set its weight to 0."
            )
        return DataError(
            f"packs of data.pack_tokens = {self._pack_tokens} are too short for every document of source "
            f"{self.source.name!r}, so data.overlong = {self._overlong} leaves nothing to train on. Raise "
            "data.pack_tokens, or set data.overlong to split or truncate."
        )

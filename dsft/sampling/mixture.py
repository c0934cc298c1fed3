"""Which source gives the next document.

The next document comes from the source that is furthest behind its share of the tokens: the one with the least
``tokens drawn / weight`` in this stage (start-time fair queueing: Goyal, Vin and Chen, SIGCOMM 1996); equal ones, the
first in the configuration. So a source is never ahead of its share by more than one of its own documents, and never
behind by more than its share of one document of each other source, at any time and for any lengths.

The tags ``drawn before / weight`` of a source's documents ascend, so drawing one by one is a stable merge of the
sources' tags, and a whole block is drawn by one sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dsft.errors import DataError
from dsft.ops import backend, planning
from dsft.sampling.order import DocumentChunk, SourceOrder
from dsft.sampling.types import SourcePosition


@dataclass(frozen=True, slots=True)
class DrawnDocuments:
    """Documents in the order they were drawn. Columns as in ``DocumentChunk``, and the source's number (int32)."""

    source: npt.NDArray[np.int32]
    epoch: npt.NDArray[np.int32]
    shard: npt.NDArray[np.int32]
    document: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    planned: npt.NDArray[np.int32]
    dropped: npt.NDArray[np.int64]
    dropped_tokens: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Planned tokens of all documents."""
        return int(self.planned.sum(dtype=np.int64))


class _Reader:
    """One source's documents, read ahead in chunks and taken from the front."""

    def __init__(self, order: SourceOrder, position: SourcePosition) -> None:
        self._order = order
        self.position = position
        self._chunk: DocumentChunk | None = None
        self._taken = 0

    def fill(self) -> None:
        """Make sure that at least one document can be taken."""
        if self._chunk is None or self._taken == self._chunk.num_documents:
            self._chunk = self._order.read(self.position.epoch, self.position.group, self.position.ordinal)
            self._taken = 0

    @property
    def next_epoch(self) -> int:
        """Epoch of the next document."""
        assert self._chunk is not None
        return self._chunk.epoch

    def must_stop(self) -> bool:
        """Whether training ends before this source is repeated. Raises DataError where it must not be repeated."""
        if self._order.source.exhausted == "error":
            raise DataError(
                f"data source {self._order.source.name!r} is used up after {self.position.tokens_drawn:,} tokens, and "
                "must not be repeated (exhausted: error). Train for fewer tokens, lower its weight, add documents, or "
                "set exhausted to repeat or stop."
            )
        return self._order.source.exhausted == "stop"

    def planned(self, last_epoch: int) -> npt.NDArray[np.int32]:
        """Planned tokens of the documents read ahead, none of a later epoch than ``last_epoch``."""
        assert self._chunk is not None
        return self._chunk.planned[self._taken if self._chunk.epoch <= last_epoch else self._chunk.num_documents :]

    def take(self, count: int, source: int) -> DrawnDocuments:
        """Draw the next ``count`` documents of those read ahead."""
        chunk = self._chunk
        assert chunk is not None
        rows = slice(self._taken, self._taken + count)
        planned = chunk.planned[rows]
        if count:
            self.position = SourcePosition(
                epoch=chunk.epoch,
                group=chunk.group,
                ordinal=int(chunk.ordinal[rows][-1]) + 1,
                tokens_drawn=self.position.tokens_drawn + int(planned.sum(dtype=np.int64)),
            )
        self._taken += count
        return DrawnDocuments(
            source=np.full(count, source, dtype=np.int32),
            epoch=np.full(count, chunk.epoch, dtype=np.int32),
            shard=chunk.shard[rows],
            document=chunk.document[rows],
            length=chunk.length[rows],
            planned=planned,
            dropped=chunk.dropped[rows],
            dropped_tokens=chunk.dropped_tokens[rows],
        )


class Mixture:
    """Draws documents from several sources by weight, from a position on.

    Args:
        orders: one per source.
        positions: where each source stands.
    """

    def __init__(self, orders: Sequence[SourceOrder], positions: Sequence[SourcePosition]) -> None:
        self._readers = [_Reader(order, position) for order, position in zip(orders, positions, strict=True)]

    @property
    def positions(self) -> tuple[SourcePosition, ...]:
        """Per source, the position after the last document drawn."""
        return tuple(replace(reader.position) for reader in self._readers)

    def draw(
        self,
        weights: Sequence[float],
        stage_tokens_drawn: Sequence[int],
        max_documents: int,
        max_tokens: int,
        epoch_tokens: int,
    ) -> DrawnDocuments | None:
        """Draw until the first of: ``max_documents`` documents; at least ``max_tokens`` planned tokens; a source that
        is at its epoch's end is furthest behind, and at least ``epoch_tokens`` planned tokens are drawn.

        Args:
            weights: one per source, at least one > 0.
            stage_tokens_drawn: per source, tokens already drawn under these weights.

        Returns:
            None: training is at its end, because the next document would repeat a source whose end it is.

        Raises:
            DataError: a source with a weight has no document, or must not be repeated and is used up.
        """
        drawn = list(stage_tokens_drawn)
        active = [source for source, weight in enumerate(weights) if weight > 0]
        last_epoch = {source: self._readers[source].position.epoch for source in active}
        blocks: list[DrawnDocuments] = []
        num_tokens = 0
        while max_documents > 0 and num_tokens < max_tokens:
            block = self._draw_block(weights, drawn, last_epoch, max_documents, max_tokens - num_tokens)
            if block is None:  # the next document would be the first of an epoch
                ended = [source for source in active if self._readers[source].next_epoch > last_epoch[source]]
                source = min(ended, key=lambda source: drawn[source] / weights[source])
                if num_tokens >= epoch_tokens or self._readers[source].must_stop():
                    break
                last_epoch[source] += 1
                continue
            for source in active:
                drawn[source] += int(block.planned[block.source == source].sum(dtype=np.int64))
            max_documents -= len(block.source)
            num_tokens += block.num_tokens
            blocks.append(block)
        return _concatenate(blocks) if blocks else None

    def _draw_block(
        self,
        weights: Sequence[float],
        drawn: list[int],
        last_epoch: dict[int, int],
        max_documents: int,
        max_tokens: int,
    ) -> DrawnDocuments | None:
        """Draw as many documents as the chunks read ahead decide: those before the first chunk's end.

        Args:
            last_epoch: per source that is drawn from, the epoch that it must not leave.

        Returns:
            None: the next document is of a later epoch.
        """
        active = list(last_epoch)
        readers = [self._readers[source] for source in active]
        for reader in readers:
            reader.fill()
        owner, row = merge_by_tag(
            [self._readers[source].planned(epoch) for source, epoch in last_epoch.items()],
            [drawn[source] for source in active],
            [weights[source] for source in active],
            max_documents,
            max_tokens,
        )
        if not len(owner):
            return None
        counts = np.bincount(owner, minlength=len(active))
        taken = zip(readers, counts.tolist(), active, strict=True)
        blocks = [reader.take(count, source) for reader, count, source in taken]
        if len(blocks) == 1:
            return blocks[0]
        first_rows = np.cumsum(counts) - counts
        return _take(_concatenate(blocks), first_rows[owner] + row)


def merge_by_tag(
    planned: Sequence[npt.NDArray[np.int32]],
    drawn: Sequence[int],
    weights: Sequence[float],
    max_documents: int,
    max_tokens: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The order in which sources' documents are drawn, as far as those read ahead decide it: up to the first tag that
    a document not yet read could have.

    Args:
        planned: per source, tokens of the documents read ahead, each >= 1; none: the source's next one is not known.
        drawn: per source, tokens drawn before them.
        weights: per source, > 0.
        max_documents, max_tokens: draw no more documents; end with the one that reaches so many tokens. Each >= 1.

    Returns:
        (owner, row) int64 per document drawn: position of its source in ``planned``, and its place in that column.
    """
    if backend.current() == "native":
        return planning.merge_by_tag(planned, drawn, weights, max_documents, max_tokens)
    return merge_by_tag_reference(planned, drawn, weights, max_documents, max_tokens)


def merge_by_tag_reference(
    planned: Sequence[npt.NDArray[np.int32]],
    drawn: Sequence[int],
    weights: Sequence[float],
    max_documents: int,
    max_tokens: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Arguments and result: :func:`merge_by_tag`."""
    tags = []
    for lengths, before, weight in zip(planned, drawn, weights, strict=True):
        ends = before + np.cumsum(lengths, dtype=np.int64)
        tags.append(np.concatenate(([before], ends)) / weight)
    horizon = min(tag[-1] for tag in tags)
    counts = [int(np.searchsorted(tag[:-1], horizon, side="left")) for tag in tags]
    decided = np.concatenate([tag[:count] for tag, count in zip(tags, counts, strict=True)])
    order = np.argsort(decided, kind="stable")
    owner = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    row = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    lengths = np.concatenate([lengths[:count] for lengths, count in zip(planned, counts, strict=True)])
    enough = int(np.searchsorted(np.cumsum(lengths[order], dtype=np.int64), max_tokens, side="left")) + 1
    order = order[: min(enough, max_documents)]
    return owner[order], row[order]


def _columns(documents: DrawnDocuments) -> tuple[npt.NDArray[np.generic], ...]:
    return tuple(getattr(documents, name) for name in DrawnDocuments.__slots__)


def _take(documents: DrawnDocuments, rows: npt.NDArray[np.int64]) -> DrawnDocuments:
    return DrawnDocuments(*(column.take(rows) for column in _columns(documents)))  # type: ignore[arg-type]


def _concatenate(blocks: list[DrawnDocuments]) -> DrawnDocuments:
    if len(blocks) == 1:
        return blocks[0]
    columns = zip(*(_columns(block) for block in blocks), strict=True)
    return DrawnDocuments(*(np.concatenate(column) for column in columns))

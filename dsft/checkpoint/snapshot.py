"""The state of one step, written by a thread while training goes on, without a second copy of it.

Masters and optimizer states change only inside ``engine.step()``, so during the next forward and backward they are
written from where they are. Before the next step, what is not yet written is copied, from the end of the file backwards
towards the writer, into memory that is reused from save to save; when that is full, the step waits until the writer has
come so far. What never changes (frozen weights) is not copied at all, and what may change at any time (buffers: small)
is copied at once.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from dsft.checkpoint.engine_state import EngineState, LocalSlice
from dsft.checkpoint.layout import LAYOUT_NAME, MASTER, WEIGHT, Layout
from dsft.checkpoint.manifest import WrittenFile
from dsft.checkpoint.shard import Entry, bytes_of, entry_name, write_shard
from dsft.errors import SaveError
from dsft.fsio import write_json

PIECE_BYTES = 1 << 22
"""What is written, or copied, at a time: a step waits for no more than this once everything else is copied."""


class SnapshotMemory:
    """Host memory for copies, allocated and touched once: a copy into fresh memory takes six times as long.

    Args:
        limit_bytes: never more than this (``checkpoint.snapshot_bytes``).
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int, *, pinned: bool) -> torch.Tensor:
        """uint8[at least min(num_bytes, limit)]; the same memory each time, so one snapshot at a time may use it."""
        wanted = min(num_bytes, self._limit_bytes)
        if len(self._memory) < wanted:
            self._memory = torch.empty(wanted, dtype=torch.uint8, pin_memory=pinned)
            self._memory.fill_(0)
        return self._memory


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements ``[first, first + num_elements)`` of a stored slice."""

    one: LocalSlice
    key: str
    first: int
    num_elements: int
    num_bytes: int


class Snapshot:
    """This rank's part of the state at the moment of construction: engine, layout, hyper-parameters, counters.

    Between the construction and the end of :meth:`write` the engine's optimizer may only be stepped after
    :meth:`secure`. One thread calls ``write``, another one the rest. Nothing here is collective.

    Attributes:
        num_bytes: what will be written.
        needs_all: training has to stand still until all is written: the state is on NVMe.
    """

    def __init__(self, engine: object, memory: SnapshotMemory) -> None:
        self._state = EngineState(engine)
        self._layout = self._state.layout()
        items = _in_file_order(self._state, self._layout)
        self._entries = [
            Entry(entry_name(one.tensor, key), self._state.dtype(one), one.stop - one.start) for one, key in items
        ]
        self._pieces = [piece for one, key in items for piece in _pieces(self._state, one, key)]
        self.num_bytes = sum(piece.num_bytes for piece in self._pieces)
        changing = [number for number, piece in enumerate(self._pieces) if piece.one.flat is not None]
        self._changing = range(changing[0], changing[-1] + 1) if changing else range(0)
        on_device = any(flat.is_cuda for flat in self._state.flats)
        self._stream = torch.cuda.Stream() if on_device else None  # type: ignore[no-untyped-call]
        self._memory = memory.take(sum(self._pieces[number].num_bytes for number in self._changing), pinned=on_device)
        self._changed = threading.Condition()  # guards what follows
        self._copies = {
            number: self._live(piece).cpu().clone()
            for number, piece in enumerate(self._pieces)
            if piece.one.tensor.kind == "buffer"
        }
        self._num_read = 0
        self._reads_live: int | None = None
        self._is_over = self._is_abandoned = False
        if on_device:
            torch.cuda.synchronize()  # the step's kernels, before another stream reads what they write
        self.needs_all = any(self._state.is_on_nvme(number) for number in range(len(self._state.flats)))

    # ------------------------------------------------------------------------------------------------ the writer

    def write(self, folder: Path) -> Sequence[WrittenFile]:
        """Write this rank's shard, and on rank 0 the layout, into ``folder``; for the thread that writes.

        Returns:
            The files, hashed and fsynced.

        Raises:
            OSError, SaveError: this rank could not write (``commit`` makes all ranks agree), or it was abandoned.
        """
        try:
            with closing(self._read()) as contents:
                files = write_shard(folder, self._state.rank, self._entries, contents)
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
        if self._state.rank == 0:
            write_json(folder / LAYOUT_NAME, self._layout.to_json())
        return files

    def _read(self) -> Generator[memoryview, None, None]:
        with ExitStack() as stack:
            if self._stream is not None:
                # A new thread begins on device 0, and leaving the stream would set that: a context there for each rank.
                torch.cuda.set_device(self._stream.device)
                stack.enter_context(torch.cuda.stream(self._stream))
            for flat, numbers in groupby(range(len(self._pieces)), key=lambda n: self._pieces[n].one.flat):
                with self._state.resident(flat):
                    for number in numbers:
                        yield bytes_of(self._begin(number))
                        self._end()

    def _begin(self, number: int) -> torch.Tensor:
        with self._changed:
            if self._is_abandoned:
                raise SaveError("this save was abandoned, because the run ends")
            copy = self._copies.get(number)
            if copy is not None:
                return copy
            self._reads_live = number
        return self._live(self._pieces[number]).cpu()

    def _end(self) -> None:
        with self._changed:
            self._num_read += 1
            self._reads_live = None
            self._changed.notify_all()

    def _live(self, piece: _Piece) -> torch.Tensor:
        return self._state.view(piece.one, piece.key)[piece.first : piece.first + piece.num_elements]

    # ------------------------------------------------------------------------------------------------ training

    def secure(self) -> None:
        """Return when the optimizer may be stepped: all that it changes is written or copied.

        What is on NVMe is never copied: DeepSpeed's swapper, which reads it, may not be used by two threads at a time,
        so :meth:`secure` is called before the next forward then (``needs_all``).
        """
        first_copied = self._changing.stop if self.needs_all else self._copy_backwards()
        num_needed = 0 if first_copied == self._changing.start else first_copied

        def is_secured() -> bool:
            reads_changing = self._reads_live is not None and self._reads_live in self._changing
            return self._is_over or (self._num_read >= num_needed and not reads_changing)

        with self._changed:
            self._changed.wait_for(is_secured)

    def _copy_backwards(self) -> int:
        """Copy until the writer is met or the memory is full; returns the first piece that is copied."""
        free_bytes = len(self._memory)
        for number in reversed(self._changing):
            piece = self._pieces[number]
            with self._changed:
                is_met = number < self._num_read or number == self._reads_live
                is_copied = number in self._copies
            if is_met or free_bytes < piece.num_bytes:
                return number + 1
            free_bytes -= piece.num_bytes
            if not is_copied:
                copy = self._memory[free_bytes : free_bytes + piece.num_bytes]
                copy.copy_(self._live(piece).view(torch.uint8))
                with self._changed:
                    self._copies[number] = copy
        return self._changing.start

    def abandon(self) -> None:
        """The writer is to end at its next piece; what it wrote is of no use."""
        with self._changed:
            self._is_abandoned = True


def _pieces(state: EngineState, one: LocalSlice, key: str) -> Iterator[_Piece]:
    num, element_bytes = one.stop - one.start, getattr(torch, state.dtype(one)).itemsize
    piece_elements = PIECE_BYTES // element_bytes
    for first in range(0, num, piece_elements):
        num_elements = min(piece_elements, num - first)
        yield _Piece(one, key, first, num_elements, num_elements * element_bytes)


def _in_file_order(state: EngineState, layout: Layout) -> list[tuple[LocalSlice, str]]:
    """Slices and keys: larger types first (alignment), what changes before what does not, flat by flat (NVMe)."""
    items = [
        (one, key)
        for key in (WEIGHT, MASTER, *layout.states)
        for one in state.slices_to_write()
        if key in layout.keys_of(one.tensor)
    ]

    def place(item: tuple[LocalSlice, str]) -> tuple[int, float]:
        one, _ = item
        return -getattr(torch, state.dtype(one)).itemsize, float("inf") if one.flat is None else one.flat

    return sorted(items, key=place)

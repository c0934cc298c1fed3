"""Files from the disk of one host to the disk of another, in pieces, and checked when they arrive.

Every rank knows the whole list of transfers and takes part in its own ones, in the order of the list. Nobody leaves
another one waiting: a rank that cannot read sends something all the same, one that cannot write receives all the same,
and both say so at the end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsft.dist import Channel
from dsft.errors import CheckpointError, DamagedCheckpointError, DsftError
from dsft.fsio import BlockHashedFile, fsync_folder, save_error

PIECE_BYTES = 1 << 22
"""Sent at a time; a rank holds two of them at most, one that it sends and one that it receives."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A file that goes from one rank to another, which stores it under the same path.

    Attributes:
        source, destination: two ranks, on different hosts.
        path: of the file, on both.
        num_bytes: its length.
        hashes_sha256: hex sha256 of the hashes of its blocks.
    """

    source: int
    destination: int
    path: Path
    num_bytes: int
    hashes_sha256: str


def run_transfers(transfers: Sequence[Transfer], channel: Channel, rank: int) -> list[DsftError]:
    """Take part in the transfers of ``rank``; every rank calls it with the same list. A file appears whole or not.

    Returns:
        What went wrong here: DamagedCheckpointError for a file that cannot be read or did not arrive as it was written,
        SaveError for one that cannot be written.

    Raises:
        RankLostError: another rank is gone.
    """
    errors: list[DsftError] = []
    for batch in _batches(transfers):
        sent = next((transfer for transfer in batch if transfer.source == rank), None)
        received = next((transfer for transfer in batch if transfer.destination == rank), None)
        outgoing = None if sent is None else _Outgoing(sent)
        incoming = None if received is None else _Incoming(received)
        num_bytes = max((transfer.num_bytes for transfer in (sent, received) if transfer is not None), default=0)
        for start in range(0, num_bytes, PIECE_BYTES):
            channel.exchange(
                None if sent is None or outgoing is None or start >= sent.num_bytes else outgoing.message(start),
                None
                if received is None or incoming is None or start >= received.num_bytes
                else incoming.message(start),
            )
            if incoming is not None:
                incoming.write()
        errors += [error for one in (outgoing, incoming) if one is not None for error in one.end()]
    return errors


def _batches(transfers: Sequence[Transfer]) -> Iterator[list[Transfer]]:
    """In each, a rank sends one file at most and receives one at most; the same on every rank.

    Within a batch all go on piece by piece, so the rank that is furthest behind never waits for one that is ahead.
    """
    left = list(transfers)
    while left:
        sending: set[int] = set()
        receiving: set[int] = set()
        batch, later = [], []
        for transfer in left:
            if transfer.source in sending or transfer.destination in receiving:
                later.append(transfer)
                continue
            sending.add(transfer.source)
            receiving.add(transfer.destination)
            batch.append(transfer)
        yield batch
        left = later


class _Outgoing:
    """The file that is sent, in memory of one piece."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._buffer = np.zeros(min(PIECE_BYTES, transfer.num_bytes), dtype=np.uint8)
        self._error: OSError | None = None
        try:
            self._descriptor: int | None = os.open(transfer.path, os.O_RDONLY)
        except OSError as error:
            self._descriptor, self._error = None, error

    def message(self, start: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """The piece at ``start`` and the rank to send it to; anything, once reading has failed."""
        piece = self._buffer[: self._transfer.num_bytes - start]
        try:
            position = 0
            while self._descriptor is not None and self._error is None and position < len(piece):
                num_read = os.preadv(self._descriptor, [piece[position:].data], start + position)
                if num_read == 0:
                    raise OSError(None, "it is too short")
                position += num_read
        except OSError as error:
            self._error = error
        return self._transfer.destination, piece

    def end(self) -> list[DsftError]:
        """Close the file; what went wrong."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._error is None:
            return []
        return [DamagedCheckpointError(f"{self._transfer.path} cannot be read: {self._error.strerror}.")]


class _Incoming:
    """The file that is received, in memory of one piece, written under another name until it is whole and checked."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._buffer = np.zeros(min(PIECE_BYTES, transfer.num_bytes), dtype=np.uint8)
        self._piece = self._buffer[:0]
        self._temporary = transfer.path.with_name(f".{transfer.path.name}.arriving")
        self._error: OSError | None = None
        self._file: BlockHashedFile | None = None
        try:
            transfer.path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.unlink(missing_ok=True)  # of a start that was killed
            self._file = BlockHashedFile(self._temporary)
        except OSError as error:
            self._error = error

    def message(self, start: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """Where the piece at ``start`` is to be received, and the rank that sends it."""
        self._piece = self._buffer[: self._transfer.num_bytes - start]
        return self._transfer.source, self._piece

    def write(self) -> None:
        """Write what was received last, unless something has failed."""
        try:
            if self._file is not None and self._error is None:
                self._file.write(self._piece.data)
        except OSError as error:
            self._error = error
        self._piece = self._buffer[:0]

    def end(self) -> list[DsftError]:
        """Give the file its name if all is well; what went wrong."""
        path = self._transfer.path
        try:
            if self._file is not None:
                self._file.__exit__(None if self._error is None else OSError, self._error, None)
            if self._error is None and self._file is not None:
                if hashlib.sha256(self._file.hashes).hexdigest() != self._transfer.hashes_sha256:
                    self._temporary.unlink()
                    return [
                        DamagedCheckpointError(
                            f"{path} did not arrive from rank {self._transfer.source} as it was written: its copy "
                            "there is damaged, or the network is."
                        )
                    ]
                self._temporary.rename(path)
                fsync_folder(path.parent)
        except OSError as error:
            self._error = error
        return [] if self._error is None else [save_error(path, self._error)]


def first_damage(errors: Sequence[DsftError]) -> DsftError | None:
    """The error to tell of: a disk that cannot be written before a file that is damaged."""
    return min(errors, key=lambda error: isinstance(error, CheckpointError), default=None)

"""Memory for batches that is used again: fresh pages cost more than filling them (a fault each 4 KiB)."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
import torch

_MAX_BUFFERS = 16


class BufferPool:
    """Hands out buffers, and hands them out again once nothing of them is alive. For one thread.

    A batch may be kept as long as one likes: its memory is then not used again. At most 16 buffers are remembered.
    """

    def __init__(self) -> None:
        self._buffers: list[npt.NDArray[np.int32]] = []

    def take(self, size: int) -> torch.Tensor:
        """int32[size] of any content."""
        for number, buffer in enumerate(self._buffers):
            if len(buffer) >= size and _references(self._buffers, number, buffer) == _UNUSED:
                return torch.from_numpy(buffer[:size])
        buffer = np.empty(size, dtype=np.int32)
        self._buffers = [buffer, *self._buffers[: _MAX_BUFFERS - 1]]
        return torch.from_numpy(buffer[:size])


def _references(buffers: list[npt.NDArray[np.int32]], number: int, buffer: npt.NDArray[np.int32]) -> int:
    """References to a buffer: the list's, this call's, and one for all tensors and arrays that are parts of it."""
    return sys.getrefcount(buffer)


def _unused() -> int:
    buffers = [np.empty(1, dtype=np.int32)]
    for number, buffer in enumerate(buffers):
        return _references(buffers, number, buffer)
    raise AssertionError


_UNUSED = _unused()

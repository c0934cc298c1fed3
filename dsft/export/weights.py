"""Whole weights out of a checkpoint's shards, under the Hugging Face names, one tensor at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dsft.checkpoint.layout import MASTER, WEIGHT, read_layout
from dsft.checkpoint.opened import OpenCheckpoint
from dsft.checkpoint.shard import ShardReader, Wanted, entry_name

if TYPE_CHECKING:
    import torch


NUM_THREADS = 8
"""More than a disk of these days needs to be read at its speed."""


class WeightReader:
    """A checkpoint's shards, open; every block that is read is checked. Holds one window of each shard.

    The slices of a tensor, one in each shard, are read and checked side by side. Files are written one after the other:
    safetensors holds the interpreter's lock while it writes. Processes would not pay: on two cores and a warm cache, an
    export of 267 million parameters reads, writes and fsyncs for 1.4 s (bf16) or 1.2 to 2.0 s (fp32), of two such ones
    at once each takes 2.2 to 2.6 s or 3.4 to 3.6 s, and a further process needs 5 to 8 s for its imports.

    Attributes:
        tensors: parameters and persistent buffers by name; a tied one under each of its names.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        """Open all shards.

        Args:
            dtype: in which floating-point tensors are given; others keep their own.

        Raises:
            CheckpointError: the checkpoint is damaged or of another version.
        """
        self._dtype = dtype
        opened = OpenCheckpoint(checkpoint)
        layout = read_layout(opened)
        self.tensors = {tensor.name: tensor for tensor in layout.tensors}
        self.tensors |= {alias: self.tensors[name] for alias, name in layout.aliases.items()}
        self._stack = ExitStack()
        with ExitStack() as opening:
            self._shards = [opening.enter_context(ShardReader(opened, r)) for r in range(layout.num_ranks)]
            self._threads = opening.enter_context(ThreadPoolExecutor(min(NUM_THREADS, layout.num_ranks)))
            self._stack = opening.pop_all()

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, whole, on the CPU: the fp32 master of a trained parameter, the only copy of any other.

        Raises:
            DamagedCheckpointError: a block is not what was written.
        """
        import torch

        tensor = self.tensors[name]
        is_trained = tensor.kind == "trained"
        flat = torch.empty(tensor.num_elements, dtype=torch.float32 if is_trained else getattr(torch, tensor.dtype))
        entry = entry_name(tensor, MASTER if is_trained else WEIGHT)

        def read(writer: int) -> None:
            start, stop = tensor.slice_of(writer)
            self._shards[writer].fill([Wanted(entry, 0, flat[start:stop])])

        writers = tensor.writers_of(0, tensor.num_elements) if tensor.num_elements else ()
        for _ in self._threads.map(read, writers):
            pass
        whole = flat.view(tensor.shape)
        return whole.to(self._dtype) if whole.is_floating_point() else whole

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

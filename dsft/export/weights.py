"""Whole weights out of a checkpoint's shards, under the Hugging Face names, one tensor at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dsft.checkpoint.layout import MASTER, WEIGHT, read_layout
from dsft.checkpoint.opened import OpenCheckpoint
from dsft.checkpoint.shard import ShardReader, Wanted, entry_name

if TYPE_CHECKING:
    import torch


class WeightReader:
    """A checkpoint's shards, open; every block that is read is checked. Holds one window of each shard.

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
        for writer in tensor.writers_of(0, tensor.num_elements) if tensor.num_elements else ():
            start, stop = tensor.slice_of(writer)
            self._shards[writer].fill([Wanted(entry, 0, flat[start:stop])])
        whole = flat.view(tensor.shape)
        return whole.to(self._dtype) if whole.is_floating_point() else whole

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

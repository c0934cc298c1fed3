"""Which rank's file holds which elements of which tensor: one small JSON, the same whoever reads it.

ZeRO cuts in a regular way, so two numbers describe a tensor on any number of ranks: rank r holds the elements
``[r * slice_elements - offset_elements, (r + 1) * slice_elements - offset_elements)``, as far as they exist. Stage 3
cuts each tensor by itself (offset 0, padded to equal slices); stages 1 and 2 cut the concatenation of a parameter group
(slice: the group's partition, offset: where the tensor begins in the group).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dsft.checkpoint.opened import OpenCheckpoint
from dsft.errors import CheckpointError

LAYOUT_NAME = "layout.json"
MASTER = "master"
"""Key of a trained parameter's fp32 weights; the optimizer's states have torch's names beside it."""
WEIGHT = "weight"
"""Key of a tensor that is not trained."""

Kind = Literal["trained", "frozen", "buffer"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One parameter or persistent buffer.

    Attributes:
        name: in the Hugging Face model.
        kind: trained parameters have a master and optimizer states, the others one copy in their own type.
        shape: of the whole tensor.
        dtype: of the model's tensor (``float32``, ``bfloat16``, ...).
        slice_elements, offset_elements: how it is cut, see above.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    slice_elements: int
    offset_elements: int

    @property
    def num_elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)

    def slice_of(self, rank: int) -> tuple[int, int]:
        """[start, stop) of the elements that ``rank`` wrote; empty for many ranks of a small tensor."""
        start = rank * self.slice_elements - self.offset_elements
        return max(0, min(start, self.num_elements)), max(0, min(start + self.slice_elements, self.num_elements))

    def writers_of(self, start: int, stop: int) -> range:
        """The ranks that wrote the elements ``[start, stop)``, which are not none."""
        first, last = start + self.offset_elements, stop - 1 + self.offset_elements
        return range(first // self.slice_elements, last // self.slice_elements + 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint's shards hold.

    Attributes:
        num_ranks: that wrote it.
        zero_stage: of the engine that wrote it.
        optimizer: class of the optimizer.
        step: updates the optimizer has made.
        states: names of its states, each as large as the parameters (``exp_avg``, ``exp_avg_sq``).
        groups: parameter groups: ``parameters`` (names) and ``hyper_parameters``.
        counters: DeepSpeed's own counters.
        tensors: all of them, each once.
        aliases: further names of a tensor (tied weights) -> its name in ``tensors``.
        versions: of the packages that wrote it.
    """

    num_ranks: int
    zero_stage: int
    optimizer: str
    step: int
    states: tuple[str, ...]
    groups: tuple[dict[str, Any], ...]
    counters: dict[str, int]
    tensors: tuple[StoredTensor, ...]
    aliases: dict[str, str]
    versions: dict[str, str]

    def keys_of(self, tensor: StoredTensor) -> tuple[str, ...]:
        """What is stored of ``tensor``."""
        return (MASTER, *self.states) if tensor.kind == "trained" else (WEIGHT,)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def shard_name(rank: int) -> str:
    """File of one rank's slices, inside the checkpoint."""
    return f"shards/rank-{rank:05d}.safetensors"


def blocks_name(rank: int) -> str:
    """File of the hashes of :func:`shard_name`'s blocks."""
    return f"shards/rank-{rank:05d}.blocks"


def read_layout(checkpoint: OpenCheckpoint) -> Layout:
    """Read and check a checkpoint's layout.

    Raises:
        DamagedCheckpointError: absent, or not what was written.
        CheckpointError: its fields are not those of this version.
    """
    values = json.loads(checkpoint.read(LAYOUT_NAME))
    try:
        tensors = tuple(StoredTensor(**{**one, "shape": tuple(one["shape"])}) for one in values.pop("tensors"))
        return Layout(tensors=tensors, states=tuple(values.pop("states")), groups=tuple(values.pop("groups")), **values)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder / LAYOUT_NAME} is not understood ({error}): another version of dsft wrote it; use "
            "that one."
        ) from error

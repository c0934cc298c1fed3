"""Loading model and optimizer state from a checkpoint, at any world size and ZeRO stage (``snapshot`` saves it).

A rank reads from the shards only what it needs, and compares each block with what was written; nobody uses anything
before all ranks have agreed that all of it was good.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.checkpoint.engine_state import EngineState, LocalSlice
from dsft.checkpoint.layout import Layout, StoredTensor, read_layout
from dsft.checkpoint.local_disk import LocalDisk
from dsft.checkpoint.opened import OpenCheckpoint
from dsft.checkpoint.shard import ShardReader, Wanted, entry_name
from dsft.dist import Groups
from dsft.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def check_engine(engine: Any) -> None:
    """Raises ConfigError when the state of this engine cannot be saved: at the start, not at the first save."""
    EngineState(engine)


def load_engine(engine: Any, checkpoint: Path, groups: Groups, disk: LocalDisk | None = None) -> None:
    """Load a checkpoint into an engine: masters, optimizer states and frozen weights, bit by bit. Collective.

    Any number of ranks and any of ZeRO's stages 1 to 3, whatever saved it. The hyper-parameters stay the engine's. Each
    block that is read is verified, and so is every other file of the checkpoint, by one of the ranks.

    Args:
        disk: of this host, where shards that only other hosts have are brought first; None: all are in reach.

    Raises:
        DamagedCheckpointError: something is not what was written; on every rank alike. The engine then holds parts of
            the checkpoint: load another one, or drop it.
        CheckpointError: it is of another model; on every rank alike.
    """
    with groups.together():
        state = EngineState(engine)
        opened = OpenCheckpoint(checkpoint)
        layout = read_layout(opened)
        _check_fit(checkpoint, layout, state)
        needed = _writers(layout, state)

    def read(checked: Collection[int]) -> None:
        with groups.together():
            state.prepare_optimizer(layout.step, layout.states)
            for batch in state.batches():
                _fill(opened, layout, state, batch, checked)
            for number, file in enumerate(opened.files.values()):
                if not file.blocks and number % groups.size == groups.rank:
                    opened.check_file(file)

    if disk is None:
        read(range(groups.rank, layout.num_ranks, groups.size))
    else:
        disk.load(opened, needed, read)
    state.use_masters(layout.counters)


def _writers(layout: Layout, state: EngineState) -> set[int]:
    """The ranks whose shards hold something that this rank needs."""
    saved = {tensor.name: tensor for tensor in layout.tensors}
    return {w for one in state.slices_to_fill() for w in saved[one.tensor.name].writers_of(one.start, one.stop)}


def _check_fit(checkpoint: Path, layout: Layout, state: EngineState) -> None:
    """The checkpoint's tensors must be the engine's: same names, shapes, and same ones trained."""

    def identity(tensor: StoredTensor) -> tuple[Any, ...]:
        return (tensor.kind, list(tensor.shape), None if tensor.kind == "trained" else tensor.dtype)

    saved = {tensor.name: identity(tensor) for tensor in layout.tensors}
    here = {tensor.name: identity(tensor) for tensor in state.tensors}
    differing = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{checkpoint} does not fit this model: {len(differing)} tensors differ, the first is {name} (saved: "
            f"{_described(saved.get(name))}; here: {_described(here.get(name))}). Resume with the model and train "
            "section that saved it, or start a new run from its weights (model.path)."
        )


def _described(identity: tuple[Any, ...] | None) -> str:
    if identity is None:
        return "absent"
    kind, shape, dtype = identity
    return f"{kind}, shape {shape}" + (f", {dtype}" if dtype else "")


def _fill(
    opened: OpenCheckpoint,
    layout: Layout,
    state: EngineState,
    batch: frozenset[int | None],
    checked: Collection[int],
) -> None:
    """Read this rank's part of the flat tensors in ``batch``; None stands for what is not trained.

    With what is not trained, the headers of this rank's share of all shards (``checked``) are read too: of a small
    model, some shards hold nothing that any rank needs, and must still be whole.
    """
    saved = {tensor.name: tensor for tensor in layout.tensors}
    wanted: dict[int, list[Wanted]] = defaultdict(list)
    if None in batch:
        wanted.update({writer: [] for writer in checked})
    with ExitStack() as stack:
        for flat in batch:
            stack.enter_context(state.resident(flat, changed=True))
        for one in state.slices_to_fill():
            if one.flat in batch:
                for key in layout.keys_of(one.tensor):
                    _add_wanted(wanted, saved[one.tensor.name], one, key, state.view(one, key))
        for writer in sorted(wanted):
            with ShardReader(opened, writer) as shard:
                shard.fill(wanted[writer])


def _add_wanted(
    wanted: dict[int, list[Wanted]], saved: StoredTensor, one: LocalSlice, key: str, into: torch.Tensor
) -> None:
    """Split what a slice needs over the shards that hold it."""
    for writer in saved.writers_of(one.start, one.stop):
        begin, end = saved.slice_of(writer)
        start, stop = max(one.start, begin), min(one.stop, end)
        part = into[start - one.start : stop - one.start]
        wanted[writer].append(Wanted(entry_name(saved, key), start - begin, part))

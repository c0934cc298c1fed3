"""Saves whose writer is held back while the optimizer goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

from dsft.checkpoint import snapshot
from dsft.checkpoint.layout import shard_name
from dsft.checkpoint.snapshot import Snapshot, SnapshotMemory
from dsft.dist import Groups
from tests.support.toy_engine import SETTINGS, make_engine, train

PIECE_BYTES, MEMORY_BYTES = 512, 1500
"""So that the toy's state has some fifty pieces, of which the small memory holds two."""
NUM_WRITTEN = 6
"""Pieces that the writer gets rid of before the step."""
ALL = 1000


class GatedSnapshot(Snapshot):
    """Its writer begins a piece only when it is let through."""

    def __init__(self, engine: Any, memory: SnapshotMemory) -> None:
        super().__init__(engine, memory)
        self.passes = threading.Semaphore(0)

    def _begin(self, number: int) -> torch.Tensor:
        self.passes.acquire()
        return super()._begin(number)


def step_meanwhile(groups: Groups, engine: Any, folder: Path, memory_bytes: int, secure: bool) -> tuple[bool, bool]:
    """Save while two steps are taken; returns whether the step had to wait for the writer, and whether the file holds
    what a save at once of the same state did.
    """
    for name in ("at once", "meanwhile"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Snapshot(engine, SnapshotMemory(0)).write(folder / "at once")
    saved = GatedSnapshot(engine, SnapshotMemory(memory_bytes))
    writer = threading.Thread(target=saved.write, args=(folder / "meanwhile",), daemon=True)
    writer.start()
    saved.passes.release(NUM_WRITTEN)
    while saved._num_read < NUM_WRITTEN:
        time.sleep(0.01)
    securing = threading.Thread(target=saved.secure if secure else lambda: None, daemon=True)
    securing.start()
    securing.join(0.3 if memory_bytes == MEMORY_BYTES else 60)
    waited = securing.is_alive()
    if waited:
        saved.passes.release(ALL)
    securing.join(60)
    for name, buffer in engine.module.named_buffers():
        if name.endswith("count"):
            buffer.add_(1)
    train(engine, 100, 1, groups)
    if secure:
        saved.secure()  # of the second step: there is nothing left to do
    train(engine, 101, 1, groups)
    saved.passes.release(ALL)
    writer.join(60)
    files = [(folder / name / shard_name(groups.rank)).read_bytes() for name in ("at once", "meanwhile")]
    return waited, files[0] == files[1]


def save_while_training(groups: Groups, folder: Path, name: str, device_type: str = "cpu") -> list[tuple[bool, bool]]:
    """:func:`step_meanwhile` with enough memory, with too little, and with enough but without ``secure``."""
    snapshot.PIECE_BYTES = PIECE_BYTES
    engine = make_engine({**SETTINGS[name], "device_type": device_type}, seed=1)
    train(engine, 0, 2, groups)
    return [
        step_meanwhile(groups, engine, folder / name / str(number), memory_bytes, secure)
        for number, (memory_bytes, secure) in enumerate(((10**6, True), (MEMORY_BYTES, True), (10**6, False)))
    ]

"""A save of state on the device: it holds the moment at which it began, whatever the device does meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.ranks import REPOSITORY

if TYPE_CHECKING:
    from dsft.dist import DeviceType, Groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BUSY_CYCLES = 10**9
"""Half a second or so of the device, far longer than the host needs to begin a save."""


@pytest.mark.timeout(150)
def test_a_save_holds_the_moment_at_which_it_began(tmp_path: Path) -> None:
    """In a process of its own: a DeepSpeed engine leaves much behind, and a machine may have torch alone."""
    pytest.importorskip("deepspeed")
    code = f"from pathlib import Path; from tests.gpu.test_snapshot import both; both(Path({str(tmp_path)!r}), 'cuda')"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=140)


def both(folder: Path, device_type: DeviceType) -> None:
    """What the process of the test does; with device_type cpu, all of it but the device's own queue."""
    from dsft import dist
    from dsft.world import discover_world

    groups = dist.init(discover_world(os.environ, None), device_type)
    optimizer_steps(groups, folder, device_type)
    queued_kernels(folder, device_type)
    groups.close()


def optimizer_steps(groups: Groups, folder: Path, device_type: DeviceType) -> None:
    """The optimizer's own next steps, the writer held back."""
    from tests.support.snapshots import save_while_training

    for name in ("stage 1", "stage 2 bf16", "stage 3"):
        enough, small, unsecured = save_while_training(groups, folder, name, device_type)
        assert enough == (False, True), f"{name}: all is copied, the step does not wait for the writer"
        assert small == (True, True), f"{name}: the memory is full, the step waits"
        assert unsecured == (False, False), f"{name}: without it, the steps are seen in the file"


def queued_kernels(folder: Path, device_type: DeviceType) -> None:
    """Kernels that are queued, not run, when a save begins belong to it; those queued right after ``secure`` do not."""
    from safetensors.torch import load_file

    from dsft.checkpoint.engine_state import EngineState
    from dsft.checkpoint.layout import MASTER, shard_name
    from dsft.checkpoint.shard import entry_name
    from dsft.checkpoint.snapshot import Snapshot, SnapshotMemory
    from tests.support.toy_engine import SETTINGS, make_engine

    state = EngineState(make_engine({**SETTINGS["stage 3"], "device_type": device_type}, seed=1, hidden=301))
    assert all(flat.device.type == device_type for flat in state.flats)
    for memory_bytes in (10**9, 0):  # copied into pinned memory; read from the device while the step waits
        before = [flat.detach().cpu().clone() for flat in state.flats]
        where = folder / f"memory-{memory_bytes}"
        where.mkdir()
        if device_type == "cuda":
            torch.cuda._sleep(BUSY_CYCLES)
        for flat in state.flats:
            flat.data.add_(1)
        saved = Snapshot(state.engine, SnapshotMemory(memory_bytes))
        writer = threading.Thread(target=saved.write, args=(where,), daemon=True)
        writer.start()
        saved.secure()
        for flat in state.flats:
            flat.data.add_(1)
        writer.join(60)
        stored = load_file(where / shard_name(0))
        for one in (one for one in state.slices_to_write() if one.flat is not None):
            expected = before[one.flat][one.at : one.at + one.stop - one.start] + 1
            assert torch.equal(stored[entry_name(one.tensor, MASTER)], expected), (memory_bytes, one.tensor.name)

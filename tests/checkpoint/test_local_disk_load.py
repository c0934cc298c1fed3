"""Loading from the disks of other hosts: lost and replaced hosts, other numbers of ranks, damaged copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dsft.checkpoint.gather import gather
from dsft.checkpoint.local_disk import LocalDisk, open_local_disk
from dsft.checkpoint.payload import load_engine
from dsft.checkpoint.verify import newest_usable
from dsft.dist import Groups
from dsft.errors import CheckpointError, DamagedCheckpointError
from tests.support.checkpoints import save_step
from tests.support.hosts import LOCAL_DIR, playing_host, shards_on
from tests.support.ranks import run_ranks
from tests.support.toy_engine import SETTINGS, differing, make_engine, train, whole_state

pytestmark = [pytest.mark.launch]

OLDER, NEWER = "step-00000001", "step-00000002"


def attempt(groups: Groups, folder: Path, disk: LocalDisk) -> tuple[str, list[str]]:
    """The checkpoint that a fresh engine went on from, or the error; and what of it differs from what was saved."""
    engine = make_engine(SETTINGS["stage 3 offload"], seed=2, hidden=101)

    def use(checkpoint: Path) -> str:
        load_engine(engine, checkpoint, groups, disk)
        return checkpoint.name

    try:
        used = newest_usable(folder / "run" / "checkpoints", groups, use)
    except CheckpointError as error:
        return str(error), []
    return used, differing(whole_state(engine), torch.load(folder / f"{used}.pt"))


def flip(folder: Path, host: str, rank: int) -> None:
    """Flip a bit in the middle of a host's copy of a rank's shard in the newer checkpoint."""
    (path,) = (folder / f"host-{host}" / "disk").glob(f"*/{NEWER}.*/rank-0000{rank}.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def opened_disk(groups: Groups, folder: Path, start: str) -> LocalDisk:
    disk = open_local_disk(LOCAL_DIR, folder / "run" / "checkpoints", start, groups)
    assert disk is not None
    return disk


def save_and_damage(groups: Groups, folder: Path) -> dict[str, tuple[str, list[str]]]:
    host = "abc"[groups.rank]
    found = {}
    with playing_host(folder, host):
        disk = opened_disk(groups, folder, "first")
        engine = make_engine(SETTINGS["stage 3 offload"], seed=1, hidden=101)
        for step, name in ((1, OLDER), (2, NEWER)):
            train(engine, step, 1, groups)
            save_step(engine, folder / "run" / "checkpoints", step, groups, disk)
            state = whole_state(engine)
            if groups.rank == 0:
                torch.save(state, folder / f"{name}.pt")
        found["all there"] = attempt(groups, folder, disk)
        saved = folder / "saved"
        if groups.rank == 0:
            shutil.copytree(folder / "host-b", saved)
            shutil.rmtree(folder / "host-b" / "disk" / disk.folder.name)
        groups.barrier()
        found["b was replaced"] = attempt(groups, folder, opened_disk(groups, folder, "second"))
        if groups.rank == 0:
            brought = [
                "rank-00000.safetensors",
                "rank-00001.safetensors",
            ]  # buffers are in the first, its own in the other
            assert shards_on(folder, "b") == {NEWER: brought}
            shutil.copytree(saved, folder / "host-b", dirs_exist_ok=True)
            flip(folder, "a", 0)
        groups.barrier()
        found["a's own shard has a wrong bit"] = attempt(groups, folder, disk)
        if groups.rank == 0:
            assert "rank-00000.safetensors.damaged" in shards_on(folder, "a")[NEWER]
            flip(folder, "b", 1)
            flip(folder, "c", 1)
        groups.barrier()
        found["both copies have a wrong bit"] = attempt(groups, folder, disk)
        groups.barrier()
        if groups.rank == 0:
            shutil.rmtree(folder / "host-b" / "disk")
            shutil.copytree(saved / "disk", folder / "host-b" / "disk")
        gather(folder / "run" / "checkpoints" / OLDER)
    return found


def load_on(groups: Groups, folder: Path, hosts: str) -> tuple[str, list[str]]:
    with playing_host(folder, hosts[groups.rank]):
        return attempt(groups, folder, opened_disk(groups, folder, f"on-{hosts}"))


def load_on_the_last_one(groups: Groups, folder: Path) -> tuple[str, list[str], str]:
    with playing_host(folder, "a"):
        disk = opened_disk(groups, folder, "alone")
        engine = make_engine(SETTINGS["stage 1"], seed=2, hidden=101)
        with pytest.raises(DamagedCheckpointError) as caught:
            load_engine(engine, folder / "run" / "checkpoints" / NEWER, groups, disk)
        return *attempt(groups, folder, disk), str(caught.value)


@pytest.mark.timeout(400)
def test_lost_hosts_and_damaged_copies(tmp_path: Path) -> None:
    for found in run_ranks(save_and_damage, 3, tmp_path, timeout_seconds=300):
        assert found == {
            "all there": (NEWER, []),
            "b was replaced": (NEWER, []),
            "a's own shard has a wrong bit": (NEWER, []),
            "both copies have a wrong bit": (OLDER, []),
        }
    shutil.rmtree(tmp_path / "host-c")
    assert run_ranks(load_on, 2, tmp_path, "ab", timeout_seconds=200) == [(NEWER, [])] * 2
    shutil.rmtree(tmp_path / "host-b")
    for path in (tmp_path / "host-a").rglob("rank-00001.safetensors"):
        path.unlink()  # brought there by the start before
    ((used, differing_tensors, text),) = run_ranks(load_on_the_last_one, 1, tmp_path, timeout_seconds=200)
    assert (used, differing_tensors) == (OLDER, []), "which was gathered into the run folder"
    assert "not whole on the hosts of this start (a): none of their disks has shards/rank-00001.safetensors" in text
    assert "(stored on b and c)" in text

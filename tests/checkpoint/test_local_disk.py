"""Shards on the disks of the hosts: who stores what, failures of a save, and what is left over. Real gloo ranks."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest

from dsft.checkpoint import transfer
from dsft.checkpoint.commit import save
from dsft.checkpoint.discover import checkpoints, newest
from dsft.checkpoint.gather import gather
from dsft.checkpoint.layout import blocks_name, shard_name
from dsft.checkpoint.local_disk import ID_NAME, LocalDisk, open_local_disk
from dsft.checkpoint.manifest import WrittenFile
from dsft.checkpoint.opened import OpenCheckpoint
from dsft.checkpoint.retention import Keep
from dsft.checkpoint.verify import find_damage
from dsft.dist import Groups
from dsft.errors import ConfigError, SaveError
from dsft.fsio import BlockHashedFile, hash_file, write_bytes
from tests.support.hosts import LOCAL_DIR, playing_host, shards_on
from tests.support.ranks import RankError, run_ranks


def content(rank: int, step: int) -> bytes:
    """Several pieces and a part of one, of another length on each rank."""
    return bytes([rank, step, 7, 201]) * (300_000 * (rank + 1) + 11)


def write(rank: int, step: int, staging: Path) -> list[WrittenFile]:
    with BlockHashedFile((staging / shard_name(rank)).resolve()) as file:
        file.write(content(rank, step))
    write_bytes(staging / blocks_name(rank), bytes(file.hashes))
    hashes = WrittenFile(blocks_name(rank), *hash_file(staging / blocks_name(rank)))
    return [WrittenFile(shard_name(rank), file.num_bytes, "", blocks_name(rank)), hashes]


def save_step(groups: Groups, run: Path, disk: LocalDisk | None, step: int, attempt: str) -> Path:
    return save(
        run,
        step,
        groups=groups,
        attempt=attempt,
        write_payload=lambda staging: write(groups.rank, step, staging),
        payload_bytes=len(content(groups.rank, step)),
        state={"step": step},
        keep=Keep(last=2),
        disk=disk,
    )


def opened_disk(groups: Groups, folder: Path, attempt: str) -> LocalDisk:
    disk = open_local_disk(LOCAL_DIR, folder / "run" / "checkpoints", attempt, groups)
    assert disk is not None
    return disk


def save_steps(groups: Groups, folder: Path, hosts: str, steps: list[int]) -> tuple[list[int | None], tuple[int, ...]]:
    transfer.PIECE_BYTES = 1 << 20
    with playing_host(folder, hosts[groups.rank]):
        disk = opened_disk(groups, folder, "a1")
        for step in steps:
            save_step(groups, folder / "run" / "checkpoints", disk, step, "a1")
        for thread in threading.enumerate():
            if thread.name == "sweep":
                thread.join()
        needed = disk.needed_bytes([10**rank for rank in range(groups.size)])
        return list(disk.keepers), (*disk.host_of, needed)


def test_each_shard_lies_on_two_hosts_and_old_ones_go(tmp_path: Path) -> None:
    results = run_ranks(save_steps, 3, tmp_path, "aab", [1, 2, 3, 4])
    assert [keepers for keepers, _ in results] == [[2, 2, 0]] * 3
    assert [found for _, found in results] == [(0, 0, 2, 111), (0, 0, 2, 111), (0, 0, 2, 111)]
    everything = [f"rank-0000{rank}.safetensors" for rank in range(3)]
    kept = dict.fromkeys(["step-00000003", "step-00000004"], everything)
    assert shards_on(tmp_path, "a") == shards_on(tmp_path, "b") == kept
    checkpoint = newest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert [path.name for path in checkpoints(checkpoint.parent)] == ["step-00000004", "step-00000003"]
    for host in "ab":
        with playing_host(tmp_path, host):
            assert find_damage(checkpoint) is None
            assert [(checkpoint / shard_name(rank)).read_bytes() == content(rank, 4) for rank in range(3)] == [True] * 3


def test_three_hosts_in_a_ring_and_gathering(tmp_path: Path) -> None:
    results = run_ranks(save_steps, 3, tmp_path, "abc", [1])
    assert results[0][0] == [1, 2, 0]
    assert [needed for _, (*_, needed) in results] == [101, 11, 110]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    with playing_host(tmp_path, "b"):
        assert [file.name for file in OpenCheckpoint(checkpoint).elsewhere()] == ["shards/rank-00002.safetensors"]
        damage = str(find_damage(checkpoint))
        assert "1 of its shards are not on this host (b) but on the disks of others (c or a)" in damage
        num_copied, opened = gather(checkpoint)
        assert (num_copied, len(opened.elsewhere())) == (2, 1)
    with playing_host(tmp_path, "c"):
        assert gather(checkpoint)[0] == 1
    assert [(checkpoint / shard_name(rank)).read_bytes() == content(rank, 1) for rank in range(3)] == [True] * 3
    with playing_host(tmp_path, "nobody"):
        assert find_damage(checkpoint) is None


def fail_to_store_the_copy(groups: Groups, folder: Path, hosts: str) -> str:
    with playing_host(folder, hosts[groups.rank]):
        disk = opened_disk(groups, folder, "a1")
        run = folder / "run" / "checkpoints"
        save_step(groups, run, disk, 1, "a1")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if groups.rank == 0:  # its own shard fits, the larger one of the other host does not
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(content(0, 2)) + 100, limits[1]))
        with pytest.raises(SaveError) as caught:
            save_step(groups, run, disk, 2, "a1")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        save_step(groups, run, disk, 2, "a1")  # the same step again
        return str(caught.value)


def test_a_copy_that_cannot_be_stored_fails_the_save_on_all(tmp_path: Path) -> None:
    texts = run_ranks(fail_to_store_the_copy, 2, tmp_path, "ab")
    assert texts[0] == texts[1]
    assert "could not be copied to the next host" in texts[0]
    assert "File too large" in texts[0]
    assert "(rank 0 on a)" in texts[0]
    run = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints(run)] == ["step-00000002", "step-00000001"]
    with playing_host(tmp_path, "a"):
        assert find_damage(run / "step-00000002") is None


def die_while_copying(groups: Groups, folder: Path, hosts: str) -> None:
    transfer.PIECE_BYTES = 1 << 16
    with playing_host(folder, hosts[groups.rank]):
        disk = opened_disk(groups, folder, "a1")
        save_step(groups, folder / "run" / "checkpoints", disk, 1, "a1")
        if groups.rank == 1:
            write_piece, pieces = transfer._Incoming.write, iter(range(9))

            def write_or_die(self: transfer._Incoming) -> None:
                write_piece(self)
                if next(pieces) == 8:
                    os.kill(os.getpid(), signal.SIGKILL)

            transfer._Incoming.write = write_or_die  # type: ignore[method-assign]
        save_step(groups, folder / "run" / "checkpoints", disk, 2, "a1")


def test_killed_while_it_copies(tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (a rank that is gone, by its own error or by its exit code)
        run_ranks(die_while_copying, 2, tmp_path, "ab")
    assert "-9" in str(caught.value) or isinstance(caught.value.__cause__, RankError)
    run = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints(run)] == ["step-00000001"]
    assert ".rank-00000.safetensors.arriving" in shards_on(tmp_path, "b")["step-00000002"]
    run_ranks(save_steps, 2, tmp_path, "ab", [3])
    both = ["rank-00000.safetensors", "rank-00001.safetensors"]
    for host in "ab":
        assert shards_on(tmp_path, host) == {"step-00000001": both, "step-00000003": both}
        with playing_host(tmp_path, host):
            assert find_damage(run / "step-00000001") is None


def open_without_folder(groups: Groups, folder: Path) -> str:
    local_dir = LOCAL_DIR if groups.rank == 0 else f"{LOCAL_DIR}/absent"
    with playing_host(folder, "ab"[groups.rank]), pytest.raises(ConfigError) as caught:
        open_local_disk(local_dir, folder / "run" / "checkpoints", "a1", groups)
    return str(caught.value)


def test_a_disk_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    texts = run_ranks(open_without_folder, 2, tmp_path)
    assert texts[0] == texts[1]
    assert "absent is no folder on b. Make it" in texts[0]


def lose_the_mount(groups: Groups, folder: Path, hosts: str) -> list[str]:
    """Saves into a run folder that is empty from the second save on, then into the old one again."""
    run, away = folder / "run", folder / "away"
    texts = []
    with playing_host(folder, hosts[groups.rank]):
        disk = opened_disk(groups, folder, "a1")
        save_step(groups, run / "checkpoints", disk, 1, "a1")
        for other_id in (None, "another run\n"):
            groups.barrier()
            if groups.rank == 0:
                run.rename(away)
                (run / "checkpoints").mkdir(parents=True)
                if other_id is not None:
                    (run / "checkpoints" / ID_NAME).write_text(other_id)
            groups.barrier()
            with pytest.raises(SaveError) as caught:
                save_step(groups, run / "checkpoints", disk, 2, "a1")
            texts.append(str(caught.value))
            groups.barrier()
            if groups.rank == 0:
                assert [path.name for path in (run / "checkpoints").iterdir() if path.name != ID_NAME] == []
                shutil.rmtree(run)
                away.rename(run)
        groups.barrier()
        save_step(groups, run / "checkpoints", disk, 3, "a1")
    return texts


def test_an_empty_folder_in_place_of_a_lost_mount_costs_no_shard(tmp_path: Path) -> None:
    texts = run_ranks(lose_the_mount, 2, tmp_path, "ab")
    assert texts[0] == texts[1]
    for text in texts[0]:
        assert f"{tmp_path}/run/checkpoints is not the folder in which this run began" in text
    both = ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert shards_on(tmp_path, "a") == shards_on(tmp_path, "b") == {"step-00000001": both, "step-00000003": both}

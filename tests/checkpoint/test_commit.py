"""A checkpoint appears whole or not at all: failures, crashes, full disks, damage, retention. Real gloo ranks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft.checkpoint import commit, discover
from dsft.checkpoint.manifest import MANIFEST_NAME, WrittenFile, read_manifest
from dsft.checkpoint.retention import HELD_OUT_KEY, Keep
from dsft.checkpoint.verify import find_damage, newest_usable
from dsft.dist import Groups
from dsft.errors import CheckpointError, SaveError
from dsft.fsio import fsync_file, hash_file
from tests.support.alone import ALONE
from tests.support.ranks import run_ranks


def payload(rank: int, step: int, num_bytes: int = 3000) -> bytes:
    return bytes((rank * 7 + step * 13 + i) % 256 for i in range(num_bytes))


def write(rank: int, step: int, staging: Path, num_bytes: int = 3000) -> list[WrittenFile]:
    (staging / "shards").mkdir(exist_ok=True)
    path = staging / "shards" / f"rank-{rank}.bin"
    path.write_bytes(payload(rank, step, num_bytes))
    fsync_file(path)
    if rank == 0:
        (staging / "helper.py").write_text("added by a library that tells nobody\n")
    return [WrittenFile(f"shards/rank-{rank}.bin", *hash_file(path))]


def save(groups: Groups, folder: str, step: int, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "groups": groups,
        "attempt": "a1",
        "write_payload": lambda staging: write(groups.rank, step, staging),
        "payload_bytes": 3000,
        "state": {"step": step, "cursor": {"window": 3}},
        "keep": Keep(last=2),
    }
    return str(commit.save(Path(folder), step, **{**arguments, **changes}))


def save_many(groups: Groups, folder: str, steps: list[int], keep_last: int = 2) -> list[str]:
    return [save(groups, folder, step, keep=Keep(last=keep_last)) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_ranks_commit_one_checkpoint(tmp_path: Path) -> None:
    paths = run_ranks(save_many, 2, str(tmp_path), [42])
    checkpoint = tmp_path / "step-00000042"
    assert paths == [[str(checkpoint)]] * 2
    assert names(tmp_path) == ["latest", "step-00000042"]
    assert (tmp_path / "latest").read_text() == "step-00000042\n"
    assert discover.newest(tmp_path) == checkpoint
    assert discover.load_state(checkpoint) == {"step": 42, "cursor": {"window": 3}}
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.attempt, manifest.world_size) == (42, "a1", 2)
    listed = {file.name: file for files in manifest.files for file in files}
    on_disk = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert set(listed) | {MANIFEST_NAME} == on_disk == {
        "shards/rank-0.bin", "shards/rank-1.bin", "helper.py", "state.json", MANIFEST_NAME,
    }  # fmt: skip
    for name, file in listed.items():
        digest = subprocess.run(["sha256sum", str(checkpoint / name)], capture_output=True, text=True, check=True)
        assert digest.stdout.split()[0] == file.sha256
        assert (checkpoint / name).stat().st_size == file.num_bytes


def fail_on_one(groups: Groups, folder: str, failing: int) -> str:
    def write_payload(staging: Path) -> list[WrittenFile]:
        if groups.rank == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(staging / "shards"))
        return write(groups.rank, 2, staging)

    save(groups, folder, 1)
    with pytest.raises(SaveError) as caught:
        save(groups, folder, 2, write_payload=write_payload)
    assert caught.value.exit_code == 74
    save(groups, folder, 3)  # the run may try again
    return str(caught.value)


@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_fails_and_all_ranks_say_so(tmp_path: Path, failing: int) -> None:
    texts = run_ranks(fail_on_one, 2, str(tmp_path), failing)
    assert texts[0] == texts[1]
    assert "no space left" in texts[0]
    assert f"(rank {failing} on " in texts[0]
    assert ".step-00000002.a1.tmp/shards" in texts[0]
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]


def save_without_space(groups: Groups, folder: str) -> str:
    with pytest.raises(SaveError) as caught:
        save(groups, folder, 1, payload_bytes=10**18, write_payload=lambda staging: pytest.fail("wrote"))
    return str(caught.value)


def test_free_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    text = save_without_space(ALONE, str(tmp_path))
    assert f"needs about {10**18:,} bytes" in text
    assert names(tmp_path) == []


def save_until_full(groups: Groups, folder: str, limit_file_bytes: bool) -> str:
    save(groups, folder, 1)
    if limit_file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    num_bytes = 300 if groups.rank == 0 else 4_000_000  # only one rank finds the disk full
    with pytest.raises(SaveError) as caught:
        save(groups, folder, 2, write_payload=lambda staging: write(groups.rank, 2, staging, num_bytes))
    return str(caught.value)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 2 MB where we may mount one; otherwise (False) a limit on the size of files stands in."""
    is_mounted = (
        os.geteuid() == 0
        and shutil.which("mount") is not None
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
        == 0
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_during_the_save(tmp_path: Path) -> None:
    with small_disk(tmp_path) as is_mounted:
        texts = run_ranks(save_until_full, 2, str(tmp_path), not is_mounted)
        assert texts[0] == texts[1]
        assert str(tmp_path) in texts[0]
        assert ("no space left" if is_mounted else "File too large") in texts[0]
        assert names(tmp_path) == ["latest", "step-00000001"]


SYSTEM_CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def die_at_call(number: int, folder: str, steps: list[int]) -> bool:
    """Save in a forked child that is killed at its ``number``-th change of the file system; False: it got through."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in SYSTEM_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        save_many(ALONE, folder, steps, keep_last=2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFSIGNALED(status)


def test_kill_at_every_change_of_the_file_system(tmp_path: Path) -> None:
    number, newest_steps = 1, set()
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        save_many(ALONE, str(folder), [1, 2])
        was_killed = die_at_call(number, str(folder), [3])
        newest = newest_verified(folder, ALONE)
        newest_steps.add(newest.name)
        save_many(ALONE, str(folder), [4])
        assert newest_verified(folder, ALONE).name == "step-00000004"
        assert names(folder) == ["latest", newest.name, "step-00000004"]  # whatever was left over is swept
        shutil.rmtree(folder)
        if not was_killed:
            break
        number += 1
    assert number > 15, "the kills reached the save"
    assert newest_steps == {"step-00000002", "step-00000003"}


def newest_verified(folder: Path, groups: Groups) -> Path:
    def use(checkpoint: Path) -> Path:
        groups.agree(find_damage(checkpoint))
        return checkpoint

    return newest_usable(folder, groups, use)


def choose(groups: Groups, folder: str) -> str:
    try:
        return newest_verified(Path(folder), groups).name
    except CheckpointError as error:
        return str(error)


def damage(checkpoint: Path, how: str) -> None:
    file = checkpoint / "shards" / "rank-1.bin"
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[:-1])
    elif how == "remove":
        file.unlink()
    elif how == "manifest":
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
        manifest["world_size"] = 1
        (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest))
    elif how == "empty manifest":
        (checkpoint / MANIFEST_NAME).write_text("")


@pytest.mark.parametrize("how", ["flip", "cut", "remove", "manifest", "empty manifest"])
def test_damage_is_found_before_use_and_the_older_one_taken(tmp_path: Path, how: str) -> None:
    run_ranks(save_many, 2, str(tmp_path), [1, 2])
    assert run_ranks(choose, 2, str(tmp_path)) == ["step-00000002"] * 2
    damage(tmp_path / "step-00000002", how)
    assert run_ranks(choose, 2, str(tmp_path)) == ["step-00000001"] * 2
    assert choose(ALONE, str(tmp_path)) == "step-00000001"  # one rank looks at every rank's files
    damage(tmp_path / "step-00000001", how)
    texts = run_ranks(choose, 2, str(tmp_path))
    assert texts[0] == texts[1]
    assert "a resume was asked for" in texts[0]


def test_no_checkpoint_is_an_error_and_partial_ones_do_not_count(tmp_path: Path) -> None:
    assert discover.newest(tmp_path / "nowhere") is None
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000009" / "model.pt").write_bytes(b"half")
    assert discover.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="step-00000009"):
        newest_verified(tmp_path, ALONE)


def test_retention_keeps_the_newest_and_what_was_just_saved(tmp_path: Path) -> None:
    save_many(ALONE, str(tmp_path), [10, 20, 30, 40])
    assert names(tmp_path) == ["latest", "step-00000030", "step-00000040"]
    save_many(ALONE, str(tmp_path), [35], keep_last=1)  # went on from step 30
    assert names(tmp_path) == ["latest", "step-00000035", "superseded-0-step-00000040"]
    newest = discover.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000035"


def test_the_first_of_each_interval_and_the_best_stay_too(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 50: 1.5, 60: 0.5, 70: 0.7}
    for step in range(10, 80, 10):
        state = {"step": step, HELD_OUT_KEY: {"papers": losses[step], "other": -step}} if step in losses else {}
        save(ALONE, str(tmp_path), step, state=state, keep=Keep(last=1, every_steps=25, best="papers"))
        best = min((one for one in losses if one <= step), key=lambda one: losses[one])
        kept = {step, best, *(one for one in (30, 50) if one <= step)}
        assert names(tmp_path) == ["latest", *(f"step-{one:08d}" for one in sorted(kept))], step


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    save_many(ALONE, str(tmp_path), [5])
    damage_file = tmp_path / "step-00000005" / "shards" / "rank-0.bin"
    damage_file.write_bytes(b"")
    save_many(ALONE, str(tmp_path), [5])
    assert choose(ALONE, str(tmp_path)) == "step-00000005"
    assert names(tmp_path) == ["latest", "step-00000005"]

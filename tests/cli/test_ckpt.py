"""``dsft ckpt`` on checkpoints of a real engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsft.checkpoint.commit import save
from dsft.checkpoint.layout import shard_name
from dsft.checkpoint.manifest import MANIFEST_NAME, manifest_to_json, read_manifest
from dsft.checkpoint.retention import Keep
from dsft.cli.ckpt import command
from dsft.dist import Groups
from dsft.errors import CheckpointError
from dsft.fsio import write_json
from tests.support.checkpoints import save_engine
from tests.support.hosts import LOCAL_DIR, playing_host
from tests.support.ranks import run_ranks
from tests.support.toy_engine import SETTINGS, make_engine, train

pytestmark = [pytest.mark.launch]


def save_two(groups: Groups, run: str) -> None:
    engine = make_engine(SETTINGS["stage 3"], seed=1)
    for step in (1, 2):
        train(engine, step, 1, groups)
        state = {"train": {"step": step, "tokens_trained": 1000 * step}, "config": {"train": {"lr": 0.1}}}
        arguments: dict[str, Any] = {"attempt": "a", "payload_bytes": 0, "state": state, "keep": Keep(last=9)}
        save(
            Path(run) / "checkpoints",
            step,
            groups=groups,
            write_payload=lambda staging: save_engine(engine, staging),
            **arguments,
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_ranks(save_two, 2, str(folder), timeout_seconds=200)
    return folder


def ckpt(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


def test_ls_and_show(run: Path) -> None:
    lines = ckpt("ls", run).splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000002", "step-00000001"]
    assert "2 ranks  2,000 tokens trained" in lines[0]
    shown = ckpt("show", run, "--tensors")
    assert "step-00000002" in shown
    assert "optimizer: AdamW, 2 updates, states exp_avg, exp_avg_sq" in shown
    assert "group 1: 3 parameters; " in shown
    assert "lr=0.005, " in shown
    assert "trained: 6 tensors, 1,322 elements" in shown
    assert "frozen.weight  [13, 13]  float32  frozen" in shown


def test_verify_and_damage(run: Path, tmp_path: Path) -> None:
    assert "every block is what was written" in ckpt("verify", run)
    damaged = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / "step-00000002", damaged)
    shard = damaged / "shards" / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00001.* is damaged: block 0"):
        ckpt("verify", damaged)
    (damaged / "MANIFEST.json").unlink()
    assert "NOT WHOLE" in ckpt("ls", tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        ckpt("ls", run / "checkpoints" / "step-00000001")


def test_diff(run: Path) -> None:
    older = run / "checkpoints" / "step-00000001"
    assert "bit-equal weights" in ckpt("diff", older, older)
    found = ckpt("diff", older, run, exit_code=1)
    assert "step: 1 -> 2" in found
    assert "first.weight: largest difference" in found
    assert "frozen.weight" not in found


def test_shards_on_disks_of_hosts_are_named_and_gathered(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    manifest = read_manifest(checkpoint)
    files = []
    for rank, host in enumerate("ab"):
        place = tmp_path / f"host-{host}" / "disk"
        place.mkdir(parents=True)
        shutil.move(checkpoint / shard_name(rank), place)
        (checkpoint / shard_name(rank)).symlink_to(Path(LOCAL_DIR) / Path(shard_name(rank)).name)
        files.append(tuple(replace(f, hosts=(host,) if f.blocks else ()) for f in manifest.files[rank]))
    write_json(checkpoint / MANIFEST_NAME, manifest_to_json(replace(manifest, files=tuple(files))))
    with playing_host(tmp_path, "a"):
        assert "1 of 2 shards on disks of other hosts, not here" in ckpt("ls", tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"1 of its shards are not on this host \(a\).* \(b\).* ckpt gather"):
            ckpt("verify", tmp_path / "run")
        text = ckpt("gather", tmp_path / "run")
        assert "1 shards copied from this host's disk, 1 still missing\n  shards/rank-00001.safetensors: on b" in text
    with playing_host(tmp_path, "b"):
        assert "1 shards copied from this host's disk, 0 still missing" in ckpt("gather", tmp_path / "run")
    assert "whole" in ckpt("verify", tmp_path / "run")
    assert "not here" not in ckpt("ls", tmp_path / "run")

"""DeepSpeed's own and universal checkpoints, imported: the same whole state as the engine that saved them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.checkpoint.deepspeed_import import import_checkpoint, load_restricted
from dsft.checkpoint.layout import read_layout
from dsft.checkpoint.opened import OpenCheckpoint
from dsft.checkpoint.payload import load_engine
from dsft.checkpoint.verify import find_damage
from dsft.dist import Groups
from dsft.errors import CheckpointError, ConfigError
from tests.support.ranks import run_ranks
from tests.support.toy_engine import SETTINGS, differing, make_engine, train, whole_state

pytestmark = [pytest.mark.launch]

NATIVE = ("stage 1", "stage 1 bf16", "stage 2 offload", "stage 3", "stage 3 offload bf16")
UNIVERSAL = ("stage 2 offload", "stage 3")


def save_natively(groups: Groups, folder: str) -> None:
    for name in NATIVE:
        engine = make_engine(SETTINGS[name], seed=1)
        train(engine, 0, 3, groups)
        engine.save_checkpoint(f"{folder}/{name}", tag="native")
        state = whole_state(engine)
        if groups.rank == 0:
            torch.save(state, f"{folder}/{name}.pt")


def load_imported(groups: Groups, folder: str, pairs: list[tuple[str, str]]) -> list[list[str]]:
    found = []
    for imported, saved in pairs:
        engine = make_engine(SETTINGS[saved], seed=2)
        load_engine(engine, Path(folder) / imported, groups)
        found.append(differing(whole_state(engine), torch.load(f"{folder}/{saved}.pt")))
    return found


def _convert_to_universal(folder: Path, name: str) -> None:
    """What ``python -m deepspeed.checkpoint.ds_to_universal`` does, in this process."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=str(folder / name / "native"),
            output_folder=str(folder / name / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    run_ranks(save_natively, 2, str(folder), timeout_seconds=300)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"not to be copied")
    return folder


@pytest.mark.timeout(400)
def test_the_whole_state_comes_over(folder: Path) -> None:
    pairs = []
    for name in NATIVE:
        source = folder / name if name == "stage 3" else folder / name / "native"  # with and without `latest`
        import_checkpoint(source, folder / f"imported {name}", folder / "model")
        pairs.append((f"imported {name}", name))
    for name in UNIVERSAL:
        _convert_to_universal(folder, name)
        import_checkpoint(folder / name / "universal", folder / f"universal {name}", folder / "model")
        pairs.append((f"universal {name}", name))
    for imported, _ in pairs:
        assert find_damage(folder / imported) is None
        layout = read_layout(OpenCheckpoint(folder / imported))
        decay = {p: group["hyper_parameters"]["weight_decay"] for group in layout.groups for p in group["parameters"]}
        assert decay["embedding.weight"] == 0.1, imported
        assert decay["norm.bias"] == 0.0, imported
        assert [group["hyper_parameters"]["lr"] for group in layout.groups] == [1e-2, 5e-3]
        assert layout.step == 3
    assert not (folder / "imported stage 3" / "model" / "model.safetensors").exists()
    assert run_ranks(load_imported, 1, str(folder), pairs, timeout_seconds=300)[0] == [[] for _ in pairs]


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("code from a file ran",)


def test_code_in_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"optimizer_state_dict": Malicious()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="without running code"):
        load_restricted(tmp_path / "file.pt")
    assert "ran" not in capsys.readouterr().out


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_states"):
        import_checkpoint(tmp_path, tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match="there already"):
        import_checkpoint(tmp_path, tmp_path, tmp_path)

"""Snapshot and load_engine at the same number of ranks: bit-equal state and bit-equal losses, with every ZeRO stage.

What a checkpoint holds is compared with what DeepSpeed's own save of the same engine gives.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from dsft.checkpoint.payload import check_engine, load_engine
from dsft.checkpoint.snapshot import Snapshot, SnapshotMemory
from dsft.dist import Groups
from dsft.errors import CheckpointError, ConfigError, SaveError
from dsft.export.weights import WeightReader
from tests.support.checkpoints import save_step
from tests.support.ranks import run_ranks
from tests.support.toy_engine import SETTINGS, differing, make_engine, train, whole_state

pytestmark = [pytest.mark.launch]


def save_and_resume(groups: Groups, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(settings, seed=1)
    train(engine, 0, 3, groups)
    path = save_step(engine, Path(folder), 3, groups)
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    at_save = whole_state(engine)
    engine.save_checkpoint(folder + "-deepspeed", tag="native")
    later = train(engine, 3, 4, groups)
    fresh = make_engine(settings, seed=2)
    load_engine(fresh, path, groups)
    after_load = whole_state(fresh)
    return {
        "saved_differs": differing(at_save, whole_state(engine)),
        "loaded_differs": differing(at_save, after_load),
        "deepspeed_differs": _differs_from_deepspeed(path, Path(folder + "-deepspeed")),
        "later": later,
        "later_resumed": train(fresh, 3, 4, groups),
        "end_differs": differing(whole_state(engine), whole_state(fresh)),
        "written": written,
        "estimate": sum(groups.all_gather_object(Snapshot(fresh, SnapshotMemory(0)).num_bytes)),
        "counters": (engine.global_steps, fresh.global_steps),
    }


def _differs_from_deepspeed(checkpoint: Path, native: Path) -> list[str]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    theirs = get_fp32_state_dict_from_zero_checkpoint(str(native), tag="native")
    with WeightReader(checkpoint, torch.float32) as weights:
        ours = {name: weights[name] for name in weights.tensors}
    missing = [name for name in ours if name not in theirs]  # under ZeRO 1 DeepSpeed's reader leaves out frozen ones
    assert missing in ([], ["frozen.weight", "frozen.bias"])
    return differing({n: ours[n] for n in ours if n not in missing}, {n: theirs[n].clone() for n in theirs})


def save_and_resume_all(groups: Groups, folder: str) -> dict[str, dict[str, Any]]:
    return {name: save_and_resume(groups, f"{folder}/{name}", settings) for name, settings in SETTINGS.items()}


@pytest.mark.timeout(700)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_state_and_losses_are_bit_equal_after_resume(tmp_path: Path, num_ranks: int) -> None:
    for results in run_ranks(save_and_resume_all, num_ranks, str(tmp_path), timeout_seconds=600):
        for name, result in results.items():
            assert "embedding.weight/exp_avg" in result["saved_differs"], "a difference is seen"
            assert result["loaded_differs"] == [], name
            assert result["deepspeed_differs"] == [], name
            assert result["later_resumed"] == result["later"], name
            assert result["end_differs"] == [], name
            assert 0.2 * result["written"] < result["estimate"] <= result["written"], name
            assert result["counters"] == (7, 7), name
    shards = sorted((tmp_path / "stage 3" / "step-00000003" / "shards").glob("*.safetensors"))
    assert len(shards) == num_ranks
    assert load_file(shards[0])["frozen.weight/weight"].shape == (-(-13 * 13 // num_ranks),)


def _full_of_nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0)


def load_into_used_memory(groups: Groups, folder: str) -> list[bool]:
    """Whether all of the states is finite, padding too, where new memory is full of NaN."""
    found = []
    for name in ("stage 1", "stage 2 offload", "stage 3", "stage 3 offload"):
        engine = make_engine(SETTINGS[name], seed=1)
        train(engine, 0, 1, groups)
        path = save_step(engine, Path(folder) / name, 1, groups)
        fresh = make_engine(SETTINGS[name], seed=2)
        with mock.patch("torch.empty_like", _full_of_nan):
            load_engine(fresh, path, groups)
        states = [value for state in fresh.optimizer.optimizer.state.values() for value in state.values()]
        found.append(all(bool(torch.isfinite(value).all()) for value in states if torch.is_tensor(value)))
    return found


def test_what_pads_the_states_is_zero(tmp_path: Path) -> None:
    assert run_ranks(load_into_used_memory, 2, str(tmp_path), timeout_seconds=200) == [[True] * 4] * 2


def save_before_the_first_update(groups: Groups, folder: str) -> list[list[str]]:
    found = []
    for name in ("stage 1", "stage 3 offload"):
        engine = make_engine(SETTINGS[name], seed=1)
        path = save_step(engine, Path(folder) / name, 0, groups)
        used = make_engine(SETTINGS[name], seed=2)
        train(used, 0, 2, groups)
        load_engine(used, path, groups)
        assert train(used, 0, 3, groups) == train(engine, 0, 3, groups)
        found.append(differing(whole_state(engine), whole_state(used)))
    return found


def test_a_checkpoint_without_optimizer_state_resets_it(tmp_path: Path) -> None:
    assert run_ranks(save_before_the_first_update, 2, str(tmp_path), timeout_seconds=200) == [[[], []]] * 2


def save_with_a_full_disk(groups: Groups, folder: str, settings: dict[str, Any]) -> str:
    engine = make_engine(settings, seed=1)
    train(engine, 0, 1, groups)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if groups.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    with pytest.raises(SaveError) as caught:
        save_step(engine, Path(folder), 1, groups)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    groups.barrier()  # rank 0 removes the staging folder
    assert not list(Path(folder).iterdir())
    train(engine, 1, 1, groups)  # nobody hangs, and training goes on
    save_step(engine, Path(folder), 2, groups)
    return str(caught.value)


def test_one_rank_that_cannot_write_stops_the_save_on_all(tmp_path: Path) -> None:
    texts = run_ranks(save_with_a_full_disk, 2, str(tmp_path), SETTINGS["stage 3 offload"], timeout_seconds=200)
    assert texts[0] == texts[1]
    assert "File too large" in texts[0]
    assert "(rank 1 on " in texts[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def make_unsupported(groups: Groups) -> str:
    engine = make_engine(SETTINGS["stage 1"], seed=1)
    engine.optimizer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ConfigError) as caught:
        check_engine(engine)
    return str(caught.value)


def test_an_optimizer_with_other_state_is_refused_by_name() -> None:
    (text,) = run_ranks(make_unsupported, 1, timeout_seconds=200)
    assert "the optimizer SGD; it knows Adam, AdamW, DeepSpeedCPUAdam" in text


def _refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


def save_and_be_refused(groups: Groups, folder: str) -> list[str]:
    engine = make_engine(SETTINGS["stage 3"], seed=1)
    path = save_step(engine, Path(folder), 1, groups)
    wider = make_engine(SETTINGS["stage 1"], seed=1, hidden=17)
    in_bf16 = make_engine(SETTINGS["stage 3 offload bf16"], seed=1)
    return [_refusal(lambda: load_engine(wider, path, groups)), _refusal(lambda: load_engine(in_bf16, path, groups))]


def test_another_model_is_refused(tmp_path: Path) -> None:
    ((shape, dtype),) = run_ranks(save_and_be_refused, 1, str(tmp_path), timeout_seconds=200)
    assert "does not fit this model: 5 tensors differ" in shape  # each tied tensor once
    assert "embedding.weight (saved: trained, shape [37, 13]; here: trained, shape [37, 17])" in shape
    assert "frozen.bias (saved: frozen, shape [13], float32; here: frozen, shape [13], bfloat16)" in dtype

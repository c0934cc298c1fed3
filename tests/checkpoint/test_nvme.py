"""Optimizer states, and weights, that DeepSpeed keeps on NVMe: saved, loaded at other sizes, and trained on from there.

DeepSpeed's ``async_io`` takes minutes to compile and needs libaio-dev, so these tests run only where it has been built:

    python -m dsft.launch.native_ops async_io && python -m pytest tests/checkpoint/test_nvme.py

Any folder will do for the swap files: DeepSpeed does not care what disk it is on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.checkpoint.engine_state import EngineState
from dsft.checkpoint.payload import load_engine
from dsft.dist import Groups
from dsft.launch.native_ops import cache_folder
from tests.support.checkpoints import save_step
from tests.support.ranks import run_ranks
from tests.support.toy_engine import differing, make_engine, train, whole_state

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(
        not (cache_folder("cpu") / "async_io" / "async_io.so").exists(),
        reason="DeepSpeed's async_io is not built here: python -m dsft.launch.native_ops async_io",
    ),
]

STEP = 3
HIDDEN, INNER = 700, 850
"""Two matrices of 595,000 elements: on two ranks, half of one in fp32 is more than the 1 MiB that DeepSpeed swaps at
least. The other sub-groups, and on three ranks all, stay in memory."""


def nvme_engine(groups: Groups, folder: Path, seed: int, *, whole: bool = False, bf16: bool = False) -> Any:
    """An engine with its swap files in a folder of each rank.

    Args:
        whole: as in ds_configs/zero3_nvme.json: weights, too, and reading and writing beside the optimizer.
    """
    path = folder / f"swap-{groups.size}-{groups.rank}-{seed}"
    path.mkdir()
    place = {"device": "nvme", "nvme_path": str(path), "pin_memory": False}
    zero: dict[str, Any] = {"offload_optimizer": {**place, "buffer_count": 4}}
    if whole:
        zero["offload_optimizer"] |= {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
        zero["offload_param"] = {**place, "buffer_count": 5, "buffer_size": 700_000, "max_in_cpu": 0}
        zero["stage3_prefetch_bucket_size"] = 0  # see dsft.config.deepspeed
    aio = {"block_size": 65536, "queue_depth": 4, "single_submit": False, "overlap_events": True}
    settings = {"stage": 3, "offload": True, "zero": zero, "aio": aio, "freeze": not whole, "bf16": bf16}
    return make_engine(settings, seed, HIDDEN, INNER)


def save_and_go_on(groups: Groups, folder: Path, kind: dict[str, bool]) -> tuple[list[bool], list[float]]:
    """Which flat tensors are on NVMe, and the losses after the save."""
    engine = nvme_engine(groups, folder, seed=1, **kind)
    train(engine, 0, STEP, groups)
    save_step(engine, folder / "checkpoints", STEP, groups)
    state = whole_state(engine)
    if groups.rank == 0:
        torch.save(state, folder / "whole.pt")
    saved = EngineState(engine)
    return [saved.is_on_nvme(number) for number in range(len(saved.flats))], train(engine, STEP, 4, groups)


def load_and_go_on(groups: Groups, folder: Path, kind: dict[str, bool]) -> tuple[list[str], list[float]]:
    """What differs after the load, and the losses from there."""
    engine = nvme_engine(groups, folder, seed=2, **kind)
    load_engine(engine, folder / "checkpoints" / f"step-{STEP:08d}", groups)
    return differing(whole_state(engine), torch.load(folder / "whole.pt")), train(engine, STEP, 4, groups)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [({}, (1, 2, 3)), ({"bf16": True}, (3,)), ({"whole": True}, (1, 2))],
    ids=["states", "states bf16", "whole"],
)
def test_saved_on_two_ranks_and_loaded_on_others(kind: dict[str, bool], sizes: tuple[int, ...], tmp_path: Path) -> None:
    on_nvme, losses = run_ranks(save_and_go_on, 2, tmp_path, kind)[0]
    assert sum(on_nvme) == 2
    assert not all(on_nvme)
    for size in sizes:
        for difference, later in run_ranks(load_and_go_on, size, tmp_path, kind):
            assert difference == []
            tolerance = 0.0 if size == 2 else 2e-2 if "bf16" in kind else 1e-6
            assert later == pytest.approx(losses, rel=tolerance, abs=0)

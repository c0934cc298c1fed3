"""DeepSpeed's state through save_engine and load_engine: bit-equal state and bit-equal losses afterwards."""

from __future__ import annotations

import hashlib
import logging
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.checkpoint.commit import save
from dsft.checkpoint.payload import estimate_bytes, load_engine, save_engine
from dsft.checkpoint.verify import newest_verified
from dsft.dist import Groups
from dsft.errors import CheckpointError, SaveError
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.launch]


class Toy(torch.nn.Module):
    """Odd sizes, so that ZeRO pads; small vectors, which ZeRO-3 keeps gathered; one frozen parameter; one buffer."""

    def __init__(self, hidden: int = 13) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(37, hidden)
        self.first = torch.nn.Linear(hidden, 29)
        self.norm = torch.nn.LayerNorm(29)
        self.second = torch.nn.Linear(29, 11, bias=False)
        self.frozen = torch.nn.Linear(11, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.first(self.embedding(ids))))
        loss: torch.Tensor = (self.frozen(self.second(hidden)) * self.scale).float().pow(2).mean()
        return loss


def make_engine(settings: dict[str, Any], seed: int, hidden: int = 13) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=settings["offload"]), "cpu")
    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": settings["stage"]},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if settings.get("bf16"):
        config["bf16"] = {"enabled": True}
    if settings["offload"]:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if settings["stage"] == 3:
            config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": False}
    if settings["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 40  # the norm and biases stay gathered
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Toy(hidden)
    else:
        model = Toy(hidden)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1, "lr": 1e-2},
        {"params": vectors, "weight_decay": 0.0, "lr": 5e-3},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
    if settings["offload"]:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def train(engine: Any, first_step: int, num_steps: int, rank: int) -> list[str]:
    losses = []
    for step in range(first_step, first_step + num_steps):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        loss = engine(torch.randint(0, 37, (1, 17), generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()).hex())
    return losses


def digest(value: Any) -> str:
    """Hash of every tensor and number in DeepSpeed's own optimizer state dict and of this rank's weights."""
    found = hashlib.sha256()

    def visit(path: str, item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.update(path.encode())
            found.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                visit(f"{path}.{key}", item[key])
        elif isinstance(item, (list, tuple)):
            for number, inner in enumerate(item):
                visit(f"{path}.{number}", inner)
        elif isinstance(item, (int, float, bool)):
            found.update(f"{path}={item!r}".encode())

    visit("", value)
    return found.hexdigest()


def state(engine: Any) -> dict[str, str]:
    weights = {
        name: (parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data)
        for name, parameter in engine.module.named_parameters()
    }
    gathered = {  # what ZeRO-3 keeps whole on every rank must not be older than its shard
        name: parameter.data
        for name, parameter in engine.module.named_parameters()
        if getattr(parameter, "ds_persist", False)
    }
    return {
        "weights": digest(weights),
        "gathered": digest({name: data for name, data in gathered.items() if data.numel()}),
        "optimizer": digest(engine.optimizer.state_dict()),
        "buffers": digest(dict(engine.module.named_buffers())),
    }


def save_and_resume(groups: Groups, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(settings, seed=1)
    train(engine, 0, 3, groups.rank)
    path = save(
        Path(folder),
        3,
        groups=groups,
        attempt="first",
        write_payload=lambda staging: save_engine(engine, staging),
        payload_bytes=estimate_bytes(engine),
        state={"step": 3},
        keep_last=1,
    )
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    at_save = state(engine)
    later = train(engine, 3, 4, groups.rank)
    at_end = state(engine)
    fresh = make_engine(settings, seed=2)
    before_load = state(fresh)
    load_engine(fresh, newest_verified(Path(folder), groups))
    return {
        "at_save": at_save,
        "before_load": before_load,
        "after_load": state(fresh),
        "later": later,
        "later_resumed": train(fresh, 3, 4, groups.rank),
        "at_end": at_end,
        "at_end_resumed": state(fresh),
        "written": written,
        "estimate": sum(groups.all_gather_object(estimate_bytes(fresh))),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1, "offload": False},
    "stage 2 bf16": {"stage": 2, "offload": False, "bf16": True},
    "stage 2 offload": {"stage": 2, "offload": True},
    "stage 3": {"stage": 3, "offload": False},
    "stage 3 offload": {"stage": 3, "offload": True},
    "stage 3 offload bf16": {"stage": 3, "offload": True, "bf16": True},
}


def save_and_resume_all(groups: Groups, folder: str) -> dict[str, dict[str, Any]]:
    return {name: save_and_resume(groups, f"{folder}/{name}", settings) for name, settings in SETTINGS.items()}


@pytest.mark.timeout(700)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_state_and_losses_are_bit_equal_after_resume(tmp_path: Path, num_ranks: int) -> None:
    for results in run_ranks(save_and_resume_all, num_ranks, str(tmp_path), timeout_seconds=600):
        for name, result in results.items():
            assert result["before_load"]["weights"] != result["at_save"]["weights"], name  # a difference is seen
            assert result["after_load"] == result["at_save"], name
            assert result["later_resumed"] == result["later"], name
            assert result["at_end_resumed"] == result["at_end"], name
            assert result["estimate"] <= result["written"], name


def save_only(groups: Groups, folder: str, settings: dict[str, Any]) -> None:
    engine = make_engine(settings, seed=1)
    train(engine, 0, 1, groups.rank)
    save(
        Path(folder),
        1,
        groups=groups,
        attempt="first",
        write_payload=lambda staging: save_engine(engine, staging),
        payload_bytes=estimate_bytes(engine),
        state={},
        keep_last=1,
    )


def save_with_a_full_disk(groups: Groups, folder: str, settings: dict[str, Any]) -> str:
    engine = make_engine(settings, seed=1)
    train(engine, 0, 1, groups.rank)
    arguments: dict[str, Any] = {
        "groups": groups,
        "attempt": "first",
        "write_payload": lambda staging: save_engine(engine, staging),
        "payload_bytes": 0,
        "state": {},
        "keep_last": 1,
    }
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if groups.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    with pytest.raises(SaveError) as caught:
        save(Path(folder), 1, **arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    groups.barrier()  # rank 0 removes the staging folder
    assert not list(Path(folder).iterdir())
    train(engine, 1, 1, groups.rank)  # nobody hangs, and training goes on
    save(Path(folder), 2, **arguments)
    return str(caught.value)


def test_one_rank_that_cannot_write_stops_the_save_on_all(tmp_path: Path) -> None:
    texts = run_ranks(save_with_a_full_disk, 2, str(tmp_path), SETTINGS["stage 3 offload"], timeout_seconds=200)
    assert texts[0] == texts[1]
    assert "File too large" in texts[0]
    assert "(rank 1 on " in texts[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def refusal(groups: Groups, folder: str, settings: dict[str, Any], hidden: int = 13) -> str:
    engine = make_engine(settings, seed=2, hidden=hidden)
    with pytest.raises(CheckpointError) as caught:
        load_engine(engine, newest_verified(Path(folder), groups))
    return str(caught.value)


def save_and_be_refused(groups: Groups, folder: str) -> list[str]:
    save_only(groups, folder, SETTINGS["stage 3"])
    return [
        refusal(groups, folder, SETTINGS["stage 1"]),
        refusal(groups, folder, SETTINGS["stage 3 offload bf16"]),
        refusal(groups, folder, SETTINGS["stage 3"], 17),
    ]


def test_another_set_up_is_refused(tmp_path: Path) -> None:
    for stage, dtype, model in run_ranks(save_and_be_refused, 2, str(tmp_path), timeout_seconds=200):
        assert "saved with ZeRO stage 3, this run has ZeRO stage 1" in stage
        assert "saved with weights in float32, this run has weights in bfloat16" in dtype
        assert "does not fit this model" in model
    (world_size,) = run_ranks(refusal, 1, str(tmp_path), SETTINGS["stage 3"], timeout_seconds=200)
    assert "saved with 2 ranks, this run has 1 ranks" in world_size

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsft.config.deepspeed import build_deepspeed_config
from dsft.config.deepspeed_keys import REFUSED_KEYS, TOP_LEVEL_KEYS
from dsft.config.load import load_config
from dsft.errors import ConfigError
from tests.support.run_yaml import write_run_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DS_CONFIGS = sorted((REPOSITORY / "ds_configs").glob("*.json"))
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))


class RecordingDict(dict[str, Any]):
    """Remembers which of its keys were asked for."""

    asked: set[str]

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked = set()

    def __copy__(self) -> RecordingDict:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def accepted_by_deepspeed(values: dict[str, Any], world_size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSpeed's own parse of a configuration, as it would be on that many ranks."""
    import deepspeed.runtime.config as deepspeed_config

    ranks = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda *group: world_size)
    monkeypatch.setattr(deepspeed_config, "dist", ranks)
    return deepspeed_config.DeepSpeedConfig(values)


def inline(tmp_path: Path, values: dict[str, Any], *overrides: str) -> dict[str, Any]:
    path = write_run_yaml(tmp_path)
    return build_deepspeed_config(load_config(path, [f"deepspeed={json.dumps(values)}", *overrides]), 2, "cuda")


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    file = tmp_path / "ds.json"
    file.write_text(text)
    config = load_config(write_run_yaml(tmp_path), [f"deepspeed={file}", *overrides])
    with pytest.raises(ConfigError) as caught:
        build_deepspeed_config(config, 2, "cuda")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("file", DS_CONFIGS, ids=lambda file: file.stem)
def test_every_file_is_accepted(
    tmp_path: Path, file: Path, world_size: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_run_yaml(tmp_path), [f"deepspeed={file}", f"model.dtype={dtype}"])
    merged = build_deepspeed_config(config, world_size, "cpu")
    assert "auto" not in json.dumps(merged)
    parsed = accepted_by_deepspeed(merged, world_size, monkeypatch)
    # 7 packs, 2 a micro-batch: 4, 2 and 2 micro-batches on 1, 2 and 3 ranks.
    assert parsed.gradient_accumulation_steps == math.ceil(7 / (2 * world_size))
    assert parsed.train_batch_size == 2 * world_size * parsed.gradient_accumulation_steps
    assert parsed.bfloat16_config.enabled == (dtype == "bf16")
    assert parsed.gradient_clipping == 1.0
    assert parsed.managed_gradient_accumulation is False
    assert file.stem.startswith(f"zero{int(parsed.zero_config.stage)}")
    offload = parsed.zero_config.offload_optimizer
    assert ("offload" in file.stem or "nvme" in file.stem) == (offload is not None)
    assert ("params" in file.stem or "nvme" in file.stem) == (parsed.zero_config.offload_param is not None)


def test_every_file_has_its_line_in_the_readme() -> None:
    readme = (REPOSITORY / "ds_configs" / "README.md").read_text()
    assert len(DS_CONFIGS) == 6
    for file in DS_CONFIGS:
        assert sum(line.startswith(f"| `{file.name}` |") for line in readme.splitlines()) == 1


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_loads_and_merges(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = load_config(file)
    world_size = config.run.world_size or 2
    accepted_by_deepspeed(build_deepspeed_config(config, world_size, "cuda"), world_size, monkeypatch)


def test_the_list_of_keys_is_that_of_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = RecordingDict(inline(tmp_path, {"zero_optimization": {"stage": 2}}))
    accepted_by_deepspeed(values, 2, monkeypatch)
    removed = {  # DeepSpeed asks for these only to say that it has removed them
        *("compression_training", "eigenvalue", "elasticity", "graph_harvesting", "nebula", "progressive_layer_drop"),
        *("quantize_training", "sparse_attention", "sparse_gradients"),
    }
    assert values.asked - removed <= TOP_LEVEL_KEYS | REFUSED_KEYS.keys()
    assert not TOP_LEVEL_KEYS & REFUSED_KEYS.keys()


def test_bf16_sums_gradients_in_fp32_unless_told_otherwise(tmp_path: Path) -> None:
    zero = {"zero_optimization": {"stage": 3}}
    merged = inline(tmp_path, zero, "model.dtype=bf16")
    assert (merged["data_types"]["grad_accum_dtype"], merged["communication_data_type"]) == ("fp32", "fp32")
    chosen = {**zero, "data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
    merged = inline(tmp_path, chosen, "model.dtype=bf16")
    assert (merged["data_types"]["grad_accum_dtype"], merged["communication_data_type"]) == ("bf16", "bf16")
    assert "data_types" not in inline(tmp_path, zero)


def test_weights_on_nvme_are_not_prefetched_unless_told_otherwise(tmp_path: Path) -> None:
    key = "stage3_prefetch_bucket_size"

    def merged(device: str, **more: Any) -> Any:
        offload = {"device": device, "nvme_path": "/nvme"}
        return inline(tmp_path, {"zero_optimization": {"stage": 3, "offload_param": offload, **more}})[
            "zero_optimization"
        ]

    assert merged("nvme")[key] == merged("nvme", **{key: "auto"})[key] == 0
    assert merged("nvme", **{key: 1000})[key] == 1000
    assert merged("cpu", **{key: "auto"})[key] > 0
    assert key not in merged("cpu")


def test_agreeing_keys_are_no_conflict(tmp_path: Path) -> None:
    merged = inline(
        tmp_path,
        {
            "train_batch_size": 7,  # the packs of a step; two ranks run 8 with a filler
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 1},
        },
    )
    assert merged["train_batch_size"] == 8


def test_the_users_values_are_not_changed(tmp_path: Path) -> None:
    values = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    config = load_config(write_run_yaml(tmp_path), [f"deepspeed={json.dumps(values)}"])
    build_deepspeed_config(config, 2, "cpu")
    assert config.deepspeed == values


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            '{\n "train_batch_size": 64\n}',
            ["ds.json, line 2: train_batch_size is 64", "train.global_batch_packs (7)", "run.yaml", "makes it 8"],
        ),
        (
            '{"zero_optimization": {"stage": 2},\n\n"train_micro_batch_size_per_gpu": 4}',
            ["ds.json, line 3: train_micro_batch_size_per_gpu is 4", "train.micro_batch_packs (2)", "run.yaml"],
        ),
        ('{"gradient_accumulation_steps": 5}', ["gradient_accumulation_steps is 5", "2 rank(s)", "makes it 2"]),
        ('{"gradient_clipping": 0.5}', ["gradient_clipping is 0.5", "train.gradient_clipping (1)"]),
        (
            '{"fp16": {"enabled": false},\n "bf16": {\n "enabled": true}}',
            ["line 3: bf16.enabled", "model.dtype (fp32)"],
        ),
        ('{"managed_gradient_accumulation": true}', ["managed_gradient_accumulation is true", "training loop"]),
        ('{"fp16": {"enabled": true}}', ["fp16 is refused", "model.dtype: bf16"]),
        ('{"optimizer": {"type": "AdamW"}}', ["optimizer cannot be used with dsft", "train.lr"]),
        ('{"scheduler": {"type": "WarmupLR"}}', ["scheduler cannot be used", "train.schedule"]),
        ('{"tensor_parallel": {"autotp_size": 2}}', ["no tensor parallelism"]),
        ('{"gradient_allreduce_op": "sum"}', ['must be "mean"']),
        ('{"compile": {"deepcompile": true}}', ["DeepCompile"]),
        ('{"bf16": {"check_grad_overflow": false}}', ["bf16.check_grad_overflow is false", "not finite"]),
        ('{"zero_optimization": {"compute_grad_norm": false}}', ["zero_optimization.compute_grad_norm is false"]),
        ('{\n"zero_optimisation": {"stage": 3}}', ["ds.json, line 2", "Did you mean zero_optimization?"]),
        ('{"zero_optimization": 3}', ["zero_optimization must be an object"]),
        ('{"zero_optimization": {"stage": "auto"}}', ["zero_optimization.stage", 'cannot fill in "auto"']),
        ('{"zero_optimization": {"stage": 3},}', ["ds.json, line 1", "not valid JSON"]),
        ('{"bf16": {}, "bf16": {}}', ["'bf16' is given twice"]),
        ("[]", ["expected a JSON object"]),
    ],
)
def test_conflicts_and_refusals_name_both_places(tmp_path: Path, text: str, parts: list[str]) -> None:
    found = refusal(tmp_path, text)
    for part in parts:
        assert part in found


@pytest.mark.parametrize("text", ['{"zero_optimization": {"stage": 0}}', '{"zero_optimization": {}}', "{}"])
def test_without_zero_is_refused(tmp_path: Path, text: str) -> None:
    assert "dsft needs ZeRO stage 1, 2 or 3" in refusal(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    config = load_config(write_run_yaml(tmp_path), ["deepspeed=no/such.json"])
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot read no/such\.json"):
        build_deepspeed_config(config, 1, "cpu")


def test_inline_conflicts_name_the_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed in .*run\.yaml: train_batch_size is 64"):
        inline(tmp_path, {"train_batch_size": 64})

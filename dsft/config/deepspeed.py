"""The DeepSpeed configuration of a run: the user's JSON, its "auto" values, and what the run's YAML decides.

The YAML owns batch sizes, gradient clipping, dtype, optimizer and schedule; the JSON owns how DeepSpeed does it (ZeRO
stage, offload, buckets, communication). A key that both give differently is an error that names both places.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.config.deepspeed_keys import REFUSED_KEYS, TOP_LEVEL_KEYS
from dsft.config.models import RunConfig
from dsft.errors import ConfigError

Keys = tuple[str, ...]

_BUCKET_ELEMENTS = 50_000_000
_AUTO_VALUES: dict[Keys, Any] = {
    ("fp16", "enabled"): False,
    ("steps_per_print",): 10**9,
    ("zero_optimization", "contiguous_gradients"): True,
    ("zero_optimization", "reduce_bucket_size"): _BUCKET_ELEMENTS,
    ("zero_optimization", "allgather_bucket_size"): _BUCKET_ELEMENTS,
    ("zero_optimization", "stage3_prefetch_bucket_size"): _BUCKET_ELEMENTS,
    ("zero_optimization", "stage3_param_persistence_threshold"): 100_000,
}
"""What "auto" means where the YAML has no say. DeepSpeed's own bucket of 5e8 elements costs 1 to 2 GB a rank."""

_DEEPSPEED_AUTO: frozenset[Keys] = frozenset({("data_types", "keep_in_fp32_modules")})
"""Where "auto" is DeepSpeed's own word and stays."""


@dataclass(frozen=True, slots=True)
class _Json:
    """A DeepSpeed configuration as it was given: its values, and what messages call it."""

    values: dict[str, Any]
    name: str
    text: str

    def place(self, keys: Keys) -> str:
        """``zero3.json, line 4: bf16.enabled``."""
        position = 0
        for key in keys:
            position = self.text.find(f'"{key}"', position)
        line = f", line {self.text.count(chr(10), 0, position) + 1}" if self.text and position >= 0 else ""
        return f"{self.name}{line}: {'.'.join(keys)}"


def build_deepspeed_config(config: RunConfig, world_size: int, device_type: str) -> dict[str, Any]:
    """The dictionary that ``deepspeed.initialize`` gets.

    Args:
        config: the run; ``config.deepspeed`` is a path (relative to the working directory) or the keys inline.
        world_size: number of ranks R. The micro-batches of a step are M = ceil(global_batch_packs / (R * b)).
        device_type: where the ranks compute, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the file is missing or not JSON, a key is unknown, refused, or contradicts the YAML.
    """
    given = _read(config)
    _check_keys(given)
    merged = copy.deepcopy(given.values)
    for keys, yaml_key, value, accepted in _owned_values(config, world_size):
        stated = _get(merged, keys)
        if stated is not None and stated != "auto" and stated not in accepted:
            raise ConfigError(
                f"{given.place(keys)} is {json.dumps(stated)}, but {yaml_key} in {config.file} makes it "
                f'{json.dumps(value)}. Write "auto" in the DeepSpeed configuration (or remove the key), or change the '
                "YAML."
            )
        _set(merged, keys, value)
    if _get(merged, ("zero_optimization", "offload_param", "device")) == "nvme":
        _do_not_prefetch_from_nvme(merged)
    _fill_auto(merged, given)
    if not _get(merged, ("zero_optimization", "stage")):
        raise ConfigError(
            f"{given.place(('zero_optimization', 'stage'))} is 0 or missing: dsft needs ZeRO stage 1, 2 or 3, because "
            "DeepSpeed without ZeRO reports no gradient norm and does not skip a step whose gradient is not finite. "
            "Stage 1 costs nothing more, on a single rank either."
        )
    if config.model.dtype == "bf16":
        _accumulate_in_fp32(merged)
    merged.setdefault("steps_per_print", 10**9)  # dsft logs; DeepSpeed's own lines would only repeat it
    _fit_to_device(merged, device_type)
    return merged


def _read(config: RunConfig) -> _Json:
    """The JSON file, or the inline keys, of a run."""
    if isinstance(config.deepspeed, dict):
        return _Json(config.deepspeed, f"deepspeed in {config.file}", "")
    path = Path(config.deepspeed)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"deepspeed in {config.file}: cannot read {path} (looked from {Path.cwd()}): {error.strerror}. "
            f"Give the path of a DeepSpeed JSON file, such as one of ds_configs/."
        ) from error
    try:
        values = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}. JSON allows no comments "
            "and no comma after the last item."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object with DeepSpeed's keys.")
    return _Json(values, str(path), text)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {twice[0]!r} is given twice; keep one of them.")
    return dict(pairs)


def _check_keys(given: _Json) -> None:
    """Refuse what dsft owns or does not support, and what DeepSpeed would ignore."""
    for key, value in given.values.items():
        if key in REFUSED_KEYS:
            raise ConfigError(f"{given.place((key,))} cannot be used with dsft: {REFUSED_KEYS[key]}. Remove the key.")
        if key not in TOP_LEVEL_KEYS:
            near = difflib.get_close_matches(key, TOP_LEVEL_KEYS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{given.place((key,))} is not a key DeepSpeed knows; it would be ignored.{hint}")
        if key in ("zero_optimization", "bf16", "fp16", "data_types") and not isinstance(value, dict):
            raise ConfigError(f"{given.place((key,))} must be an object, not {json.dumps(value)}.")
    if _get(given.values, ("fp16", "enabled")) is True:
        raise ConfigError(
            f"{given.place(('fp16', 'enabled'))}: fp16 is refused, because its dynamic loss scale is not folded into "
            "dsft's exact loss. Use model.dtype: bf16 (or fp32) in the YAML and remove the fp16 block."
        )
    if given.values.get("gradient_allreduce_op", "mean") != "mean":
        raise ConfigError(
            f'{given.place(("gradient_allreduce_op",))} must be "mean", for which dsft scales the loss. Remove the key.'
        )
    for keys in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if _get(given.values, keys) is False:
            raise ConfigError(
                f"{given.place(keys)} is false: DeepSpeed would then apply gradients that are not finite, and the "
                "weights would be lost. dsft skips and counts such steps. Remove the key."
            )
    if _get(given.values, ("compile", "deepcompile")) is True:
        raise ConfigError(
            f"{given.place(('compile', 'deepcompile'))}: DeepCompile cannot run with the gradient accumulation that "
            "dsft uses (managed_gradient_accumulation: false). Remove the key."
        )


def _owned_values(config: RunConfig, world_size: int) -> list[tuple[Keys, str, Any, tuple[Any, ...]]]:
    """What the YAML decides: (DeepSpeed's key, the YAML's key, value, values of the JSON that mean the same)."""
    micro_batch, packs = config.train.micro_batch_packs, config.train.global_batch_packs
    micro_batches = math.ceil(packs / (world_size * micro_batch))
    # DeepSpeed insists on the product; where ranks run fillers, it is more than the packs of a step.
    train_batch = micro_batch * micro_batches * world_size
    clipping = config.train.gradient_clipping
    bf16 = config.model.dtype == "bf16"
    batch_keys = f"train.global_batch_packs ({packs}), train.micro_batch_packs ({micro_batch}) and {world_size} rank(s)"
    return [
        (("train_micro_batch_size_per_gpu",), f"train.micro_batch_packs ({micro_batch})", micro_batch, (micro_batch,)),
        (("gradient_accumulation_steps",), batch_keys, micro_batches, (micro_batches,)),
        (("train_batch_size",), batch_keys, train_batch, (train_batch, packs)),
        (("gradient_clipping",), f"train.gradient_clipping ({clipping:g})", clipping, (clipping,)),
        (("bf16", "enabled"), f"model.dtype ({config.model.dtype})", bf16, (bf16,)),
        # The loop knows which micro-batch is the last of a step, and a step may have any number of them.
        (("managed_gradient_accumulation",), "dsft's training loop", False, (False,)),
    ]


def _fill_auto(values: dict[str, Any], given: _Json, prefix: Keys = ()) -> None:
    """Replace every remaining "auto", in place; one whose meaning nobody defined is an error."""
    for key, value in values.items():
        keys = (*prefix, key)
        if isinstance(value, dict):
            _fill_auto(value, given, keys)
        elif value == "auto" and keys not in _DEEPSPEED_AUTO:
            if keys not in _AUTO_VALUES:
                known = ", ".join(sorted(".".join(known) for known in _AUTO_VALUES))
                raise ConfigError(
                    f'{given.place(keys)}: dsft cannot fill in "auto" here; give a value or remove the key. It fills '
                    f"in the batch sizes, gradient_clipping, bf16.enabled, {known}."
                )
            values[key] = _AUTO_VALUES[keys]


def _do_not_prefetch_from_nvme(values: dict[str, Any]) -> None:
    """Gather weights that are on NVMe when they are due, unless the JSON gives a number.

    DeepSpeed 0.19.8 asks twice for a weight that comes twice in what it looks ahead, such as the last one of a forward,
    with which the backward begins, and then fails: "already assigned swap buffer".
    """
    if values["zero_optimization"].get("stage3_prefetch_bucket_size", "auto") == "auto":
        values["zero_optimization"]["stage3_prefetch_bucket_size"] = 0


def _accumulate_in_fp32(values: dict[str, Any]) -> None:
    """Sum gradients in fp32, over micro-batches and over ranks, unless the JSON says otherwise.

    DeepSpeed's default is the model's dtype: over 64 micro-batches that doubles the gradient's error.
    """
    values.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    values.setdefault("communication_data_type", "fp32")


def _fit_to_device(values: dict[str, Any], device_type: str) -> None:
    """On the CPU there is no second device to overlap with, and nothing to pin memory for."""
    if device_type != "cpu":
        return
    for block in ("offload_optimizer", "offload_param"):
        offload = values.get("zero_optimization", {}).get(block)
        if isinstance(offload, dict):
            offload["pin_memory"] = False


def _get(values: dict[str, Any], keys: Keys) -> Any:
    """The value at nested keys; None where it is not given."""
    place: Any = values
    for key in keys:
        if not isinstance(place, dict) or key not in place:
            return None
        place = place[key]
    return place


def _set(values: dict[str, Any], keys: Keys, value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value

"""DeepSpeed's own checkpoints (ZeRO 1, 2, 3) and universal ones, rewritten in dsft's format by one process.

A rank's flat tensors become that rank's shard, piece by piece, from the mapped files: nothing is merged, and what is in
memory at a time is bounded. The parameter groups come from the files by name, each with its own hyper-parameters
(DeepSpeed's loading of a universal ZeRO-3 checkpoint gives the first group's to all: 0.19.8).

The files are pickles. They are read with torch's restricted unpickler and a short list of classes.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsft.checkpoint.commit import publish
from dsft.checkpoint.layout import LAYOUT_NAME, MASTER, WEIGHT, Layout, StoredTensor
from dsft.checkpoint.manifest import Manifest, WrittenFile
from dsft.checkpoint.shard import Entry, bytes_of, entry_name, write_shard
from dsft.constants import MODEL_PREFIX
from dsft.errors import CheckpointError, ConfigError
from dsft.fsio import save_error, write_json

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True, slots=True)
class Source:
    """A DeepSpeed checkpoint, opened.

    Attributes:
        layout: as dsft stores it.
        pieces: per rank, (tensor, key, its flat content).
    """

    layout: Layout
    pieces: tuple[tuple[tuple[StoredTensor, str, torch.Tensor], ...], ...]


def import_checkpoint(source: Path, out: Path, model: Path) -> None:
    """Rewrite the DeepSpeed checkpoint ``source`` as dsft checkpoint ``out``, which appears whole or not at all.

    Args:
        model: Hugging Face folder whose config, tokenizer and chat template belong to the weights.

    Raises:
        CheckpointError: as :func:`open_deepspeed`.
        ConfigError: ``out`` is there already.
        SaveError: it cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; an import never overwrites. Name another folder.")
    opened = open_deepspeed(source)
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        files = _write(opened, staging)
        weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "*.index.json")
        shutil.copytree(model, staging / "model", ignore=weights)
        step = opened.layout.counters["global_steps"]
        manifest = Manifest(step, "imported", opened.layout.num_ranks, tuple(tuple(of_rank) for of_rank in files))
        publish(staging, out, manifest, {"imported_from": str(source), "world_size": opened.layout.num_ranks})
    except OSError as error:
        raise save_error(out, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(source: Source, folder: Path) -> list[list[WrittenFile]]:
    """Write the shards and the layout; returns each rank's files."""
    files = []
    for rank, pieces in enumerate(source.pieces):
        ordered = sorted(pieces, key=lambda piece: -piece[2].itemsize)
        entries = [Entry(entry_name(tensor, key), _dtype(flat), flat.numel()) for tensor, key, flat in ordered]
        files.append(write_shard(folder, rank, entries, (bytes_of(flat) for _, _, flat in ordered)))
    write_json(folder / LAYOUT_NAME, source.layout.to_json())
    return files


def open_deepspeed(folder: Path) -> Source:
    """Open a folder that holds ``*_model_states.pt`` and either ``*_optim_states.pt`` or ``zero/`` (universal).

    A folder with a file ``latest`` names the one below it.

    Raises:
        CheckpointError: it is no such checkpoint, a rank's file is missing, or a file holds what is not read here.
    """
    if (folder / "latest").is_file():
        folder = folder / (folder / "latest").read_text().strip()
    model_files = sorted(folder.glob("*_model_states.pt"), key=_rank_of)
    if not model_files:
        raise CheckpointError(
            f"{folder} holds no *_model_states.pt: it is no DeepSpeed checkpoint. Name the tag's folder."
        )
    models = [load_restricted(path) for path in model_files]
    if (folder / "zero").is_dir():
        return _open_universal(folder, models)
    optim_files = sorted(folder.glob("*_optim_states.pt"), key=_rank_of)
    if not optim_files:
        raise CheckpointError(
            f"{folder} holds no *_optim_states.pt: it was saved without ZeRO, which is not read here."
        )
    states = [load_restricted(path)["optimizer_state_dict"] for path in optim_files]
    counts = states[0]["partition_count"]
    num_ranks = max(counts) if isinstance(counts, list) else int(counts)
    if num_ranks != len(states):
        raise CheckpointError(
            f"{folder} was saved by {num_ranks} ranks and holds the optimizer state of {len(states)}."
        )
    stage = 3 if "fp32_flat_groups" in states[0] else 2 if int(states[0].get("zero_stage", 1)) == 2 else 1
    return _open_zero3(models, states) if stage == 3 else _open_zero12(models, states, stage)


def load_restricted(path: Path) -> Any:
    """``torch.load`` that runs no code from the file but that of a short list of classes.

    Raises:
        CheckpointError: the file needs another class, or cannot be read.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, OrderedDict, torch.Size]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read without running code from it ({reason}). If it is a DeepSpeed file of another "
            "version, load and save it with that version first."
        ) from error


# ------------------------------------------------------------------------------------------------------- native


def _open_zero3(models: list[dict[str, Any]], states: list[dict[str, Any]]) -> Source:
    """ZeRO 3: each flat tensor is the concatenation of a sub-group's parameters, each cut into padded equal parts."""
    num_ranks, shapes = len(states), _shapes(models[0])
    tensors: dict[str, StoredTensor] = {}
    homes: dict[str, tuple[int, int]] = {}
    for number, members in enumerate(shapes):
        at = 0
        for name, shape in members.items():
            part = -(-math.prod(shape) // num_ranks)
            tensors[name] = StoredTensor(name, "trained", shape, _model_dtype(models[0], name), part, 0)
            homes[name] = (number, at)
            at += part
        _check_length(at, states[0]["fp32_flat_groups"][number])
    frozen = _frozen(models, cut=True)
    pieces = []
    for rank, state in enumerate(states):
        flats, base = state["fp32_flat_groups"], state["optimizer_state_dict"]["state"]
        own = list(_cut(tensors, homes, rank, flats, base))
        pieces.append(tuple(own + _plain_pieces(models, rank, frozen)))
    base = states[0]["optimizer_state_dict"]
    members_of = [[shapes[number] for number in group["params"]] for group in base["param_groups"]]
    return Source(_layout(models[0], base, 3, num_ranks, [*tensors.values(), *frozen], members_of), tuple(pieces))


def _open_zero12(models: list[dict[str, Any]], states: list[dict[str, Any]], stage: int) -> Source:
    """ZeRO 1 and 2: each flat tensor is this rank's part of a group's concatenation, without its padding."""
    num_ranks, shapes = len(states), _shapes(models[0])
    base = states[0]["base_optimizer_state"]
    tensors: dict[str, StoredTensor] = {}
    homes: dict[str, tuple[int, int]] = {}
    paddings = states[0].get("param_alignment_paddings")
    for number, members in enumerate(shapes):
        flat_elements = max(state["single_partition_of_fp32_groups"][number].numel() for state in states)
        if number in base["state"]:  # with the padding, which tells where the next rank's part begins
            flat_elements = base["state"][number]["exp_avg"].numel()
        offset = 0
        for position, (name, shape) in enumerate(members.items()):
            tensors[name] = StoredTensor(name, "trained", shape, _model_dtype(models[0], name), flat_elements, offset)
            homes[name] = (number, offset)
            offset += math.prod(shape) + (paddings[number][position] if paddings else 0)
    frozen = _frozen(models, cut=False)
    pieces = []
    for rank, state in enumerate(states):
        places = {
            name: (number, max(0, offset - rank * tensors[name].slice_elements))
            for name, (number, offset) in homes.items()
        }
        flats, moments = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]["state"]
        own = list(_cut(tensors, places, rank, flats, moments))
        pieces.append(tuple(own + _plain_pieces(models, rank, frozen)))
    members_of = [[members] for members in shapes]
    return Source(_layout(models[0], base, stage, num_ranks, [*tensors.values(), *frozen], members_of), tuple(pieces))


def _cut(
    tensors: dict[str, StoredTensor],
    places: dict[str, tuple[int, int]],
    rank: int,
    flats: list[torch.Tensor],
    moments: dict[int, dict[str, torch.Tensor]],
) -> Iterator[tuple[StoredTensor, str, torch.Tensor]]:
    """A rank's pieces of all trained tensors, out of its flat ones."""
    for name, tensor in tensors.items():
        start, stop = tensor.slice_of(rank)
        if start == stop:
            continue
        number, at = places[name]
        homes = {MASTER: flats[number]}
        homes |= {key: value for key, value in moments.get(number, {}).items() if key != "step"}
        for key, home in homes.items():
            yield tensor, key, home.detach()[at : at + stop - start]


# ------------------------------------------------------------------------------------------------------- universal


def _open_universal(folder: Path, models: list[dict[str, Any]]) -> Source:
    """A folder a parameter with whole tensors: one shard, of whole tensors."""
    shapes = _shapes(models[0])
    optimizer = load_restricted(folder / "zero" / "optimizer_state.pt")
    groups = optimizer["param_groups"]
    base = optimizer.get("optimizer_state_dict") or {"state": {}, "param_groups": groups}
    pieces: list[tuple[StoredTensor, str, torch.Tensor]] = []
    tensors = []
    step = 0.0
    for name, shape in (item for members in shapes for item in members.items()):
        tensor = StoredTensor(name, "trained", shape, _model_dtype(models[0], name), max(1, math.prod(shape)), 0)
        tensors.append(tensor)
        where = folder / "zero" / _given_name(models[0], name)
        for key, file in ((MASTER, "fp32.pt"), ("exp_avg", "exp_avg.pt"), ("exp_avg_sq", "exp_avg_sq.pt")):
            value = load_restricted(where / file)
            whole = value["param"] if isinstance(value, dict) else value
            pieces.append((tensor, key, whole.reshape(-1)))
        if (where / "step.pt").is_file():
            step = float(load_restricted(where / "step.pt"))
    if base["state"]:  # ZeRO 3; 1 and 2 have a file a parameter
        step = float(next(iter(base["state"].values()))["step"])
    frozen = _frozen(models, cut=len(models) > 1)  # ZeRO 3 has a file a rank
    plain = [piece for rank in range(len(models)) for piece in _plain_pieces(models, rank, frozen)]
    for one in frozen:
        parts = [flat for tensor, _, flat in plain if tensor is one]
        whole_tensor = StoredTensor(one.name, one.kind, one.shape, one.dtype, max(1, one.num_elements), 0)
        tensors.append(whole_tensor)
        pieces.append((whole_tensor, WEIGHT, torch.cat(parts)))
    members_of = [[shapes[number] for number in group["params"]] for group in groups]
    described = {"state": {0: {"step": step, "exp_avg": 0, "exp_avg_sq": 0}}, "param_groups": groups}
    layout = _layout(models[0], described, 0, 1, tensors, members_of)
    return Source(layout, (tuple(pieces),))


# ------------------------------------------------------------------------------------------------------- common


def _layout(
    model: dict[str, Any],
    base: dict[str, Any],
    stage: int,
    num_ranks: int,
    tensors: list[StoredTensor],
    members_of: list[list[dict[str, tuple[int, ...]]]],
) -> Layout:
    groups = []
    for group, flats in zip(base["param_groups"], members_of, strict=True):
        kept = {key: value for key, value in group.items() if key not in ("params", "names")}
        groups.append({"hyper_parameters": kept, "parameters": [name for members in flats for name in members]})
    first: dict[str, Any] = next(iter(base["state"].values()), {})
    return Layout(
        num_ranks=num_ranks,
        zero_stage=stage,
        optimizer="of DeepSpeed's checkpoint",
        step=int(first.get("step", 0)),
        states=tuple(sorted(key for key in first if key != "step")),
        groups=tuple(groups),
        counters={name: int(model.get(name) or 0) for name in COUNTERS},
        tensors=tuple(tensors),
        aliases={_name(alias): _name(name) for alias, name in (model.get("shared_params") or {}).items()},
        versions={"deepspeed": str(model.get("ds_version"))},
    )


def _shapes(model: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Trained parameters and their shapes, one dict a flat tensor."""
    return [{_name(name): tuple(shape) for name, shape in members.items()} for members in model["param_shapes"]]


def _frozen(models: list[dict[str, Any]], *, cut: bool) -> list[StoredTensor]:
    """Frozen parameters (cut over the ranks under ZeRO 3) and buffers."""
    found = []
    for name in _frozen_names(models[0]):
        shapes = models[0].get("frozen_param_shapes")
        shape = tuple(shapes[name]) if shapes else tuple(models[0]["module"][name].shape)
        part = -(-math.prod(shape) // len(models)) if cut else math.prod(shape)
        dtype = _dtype(_frozen_home(models[0], name))
        found.append(StoredTensor(_name(name), "frozen", shape, dtype, max(1, part), 0))
    for name in models[0]["buffer_names"]:
        if name in models[0]["module"]:
            value = models[0]["module"][name]
            found.append(
                StoredTensor(_name(name), "buffer", tuple(value.shape), _dtype(value), max(1, value.numel()), 0)
            )
    return found


def _frozen_names(model: dict[str, Any]) -> list[str]:
    """ZeRO 2 and 3 list them; ZeRO 1 leaves them among the model's weights."""
    if model.get("frozen_param_shapes"):
        return list(model["frozen_param_shapes"])
    others = {*model["buffer_names"], *model["shared_params"], *(name for m in model["param_shapes"] for name in m)}
    return [name for name, value in model["module"].items() if name not in others and value.numel()]


def _frozen_home(model: dict[str, Any], name: str) -> torch.Tensor:
    fragments: dict[str, torch.Tensor] = model.get("frozen_param_fragments") or model["module"]
    return fragments[name]


def _plain_pieces(
    models: list[dict[str, Any]], rank: int, plain: list[StoredTensor]
) -> list[tuple[StoredTensor, str, torch.Tensor]]:
    """What ``rank`` holds of tensors that are not trained."""
    pieces = []
    for tensor in plain:
        start, stop = tensor.slice_of(rank)
        if start == stop:
            continue
        model = models[min(rank, len(models) - 1)]
        name = _given_name(model, tensor.name)
        home = model["module"][name] if tensor.kind == "buffer" else _frozen_home(model, name)
        pieces.append((tensor, WEIGHT, home.detach().reshape(-1)[: stop - start]))
    return pieces


def _name(name: str) -> str:
    """The Hugging Face name of a parameter of the saved module."""
    return name.removeprefix("module.").removeprefix(MODEL_PREFIX)


def _given_name(model: dict[str, Any], name: str) -> str:
    """The name by which a DeepSpeed file knows a parameter."""
    known = {
        *(n for m in model["param_shapes"] for n in m),
        *(model.get("frozen_param_shapes") or {}),
        *model["module"],
    }
    return next(given for given in (name, MODEL_PREFIX + name, "module." + name) if given in known)


def _model_dtype(model: dict[str, Any], name: str) -> str:
    """Type of the model's own weights, where the file holds them (ZeRO 1 and 2); else fp32, that of the masters."""
    weights = {_name(given): value for given, value in model["module"].items()}
    return _dtype(weights[name]) if name in weights and weights[name].numel() else "float32"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_length(expected: int, flat: torch.Tensor) -> None:
    if flat.numel() != expected:
        raise CheckpointError(
            f"the flat tensors have {flat.numel():,} elements, their parameters need {expected:,}: the checkpoint was "
            "saved with a partitioning that is not read here (secondary partitions, expert parallelism)."
        )


def _rank_of(path: Path) -> int:
    """``zero_pp_rank_3_mp_rank_00_optim_states.pt`` -> 3."""
    return int(path.name.split("pp_rank_")[1].split("_")[0]) if "pp_rank_" in path.name else 0

"""A dsft checkpoint as an ordinary Hugging Face folder: safetensors, config, tokenizer, chat template.

transformers itself writes the folder, from a model on the meta device whose weights it takes for offloaded ones: it
asks for them one by one, and holds one weight file's at a time. So the names on disk, the tied weights that are left
out, the layout of experts and the shards are those that ``save_pretrained`` would have made, of a model of any size.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from dsft.checkpoint.opened import OpenCheckpoint
from dsft.errors import CheckpointError, ConfigError
from dsft.fsio import fsync_file, fsync_folder, save_error

if TYPE_CHECKING:
    import torch

    from dsft.export.weights import WeightReader

ExportType = Literal["bf16", "fp32"]
DEFAULT_SHARD_BYTES = 5_000_000_000
MODEL_FOLDER = "model"
"""Folder of a checkpoint that holds config.json, tokenizer files, chat template and generation config."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    dtype: ExportType = "bf16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write ``out`` as a Hugging Face folder that plain transformers loads. One process; holds one file's weights.

    Everything that is read is checked against its hash. ``out`` appears whole, by rename, or not at all.

    Args:
        checkpoint: a checkpoint folder of a run (``<run>/checkpoints/step-<number>``).
        out: folder to make; it must not exist, or be empty.
        dtype: type of the weights. The checkpoint's master weights are fp32, so bf16 rounds once.
        max_shard_bytes: a weight file is at most this large (a single larger tensor gets its own file).
        trust_remote_code: run modelling code that lies in the checkpoint's model folder.

    Raises:
        ConfigError: ``out`` is there already.
        CheckpointError: the checkpoint is damaged, or its weights are not those of its config.
        SaveError: the folder cannot be written.
    """
    import torch

    from dsft.export.weights import WeightReader

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; export never overwrites. Name another folder.")
    _check_small_files(checkpoint)
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = _empty_model(checkpoint / MODEL_FOLDER, torch_dtype, trust_remote_code)
    with WeightReader(checkpoint, torch_dtype) as weights, _staged_folder(out) as staging:
        _check_weights(checkpoint, model.state_dict(), weights)
        _save_offloaded(model, weights, staging, max_shard_bytes)
        if not (staging / "config.json").is_file() or not any(staging.glob("*.safetensors")):
            raise CheckpointError(
                f"transformers {version('transformers')} wrote no config.json and no weights of {checkpoint}, and said "
                "nothing. Nothing was exported. Use the version that dsft's constraints name."
            )
        others = shutil.ignore_patterns("config.json")  # transformers has written it, with the exported dtype
        shutil.copytree(checkpoint / MODEL_FOLDER, staging, dirs_exist_ok=True, ignore=others)


def _check_small_files(checkpoint: Path) -> None:
    opened = OpenCheckpoint(checkpoint)
    for file in opened.files.values():
        if not file.blocks:
            opened.check_file(file)


def _save_offloaded(model: Any, weights: WeightReader, folder: Path, max_shard_bytes: int) -> None:
    """``save_pretrained`` of a model whose weights lie elsewhere: ``weights`` gives each by its name when it is due.

    Two attributes are accelerate's, by which transformers knows such a model. The third: in a started run transformers
    writes on rank 0 only, and returns without a word on the others (5.23, distributed/mixin.py); here one process
    exports, whichever rank it is.
    """
    model.hf_device_map = {"": "disk"}
    model._hf_hook = SimpleNamespace(weights_map=weights)
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)


def _empty_model(model_folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The checkpoint's model without memory for its weights (meta device); its tied weights are tied."""
    import torch
    from transformers import AutoConfig

    from dsft.model.auto import auto_class, is_masked_lm

    if not (model_folder / "config.json").is_file():
        raise CheckpointError(
            f"{model_folder / 'config.json'} is missing, so the model of this checkpoint is unknown. Export another "
            "checkpoint of the run."
        )
    try:
        config = AutoConfig.from_pretrained(model_folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model_class = auto_class(is_masked_lm(config))
            return model_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise CheckpointError(
            f"the model of {model_folder} cannot be built: {' '.join(str(error).split())} If it has its own modelling "
            "code, allow it with --trust-remote-code; if it is newer than the installed transformers, upgrade that."
        ) from error


def _check_weights(checkpoint: Path, expected: Mapping[str, torch.Tensor], weights: WeightReader) -> None:
    """transformers would fill a missing weight with random numbers at loading time: find it now."""
    found = weights.tensors
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    shapes = sorted(name for name in expected.keys() & found.keys() if tuple(expected[name].shape) != found[name].shape)
    if missing or surplus or shapes:
        raise CheckpointError(
            f"the weights of {checkpoint} are not those of its config.json: missing {missing[:3] or 'none'}, not "
            f"expected {surplus[:3] or 'none'}, of another shape {shapes[:3] or 'none'}. The checkpoint and its model "
            "folder do not belong together, or transformers is of another version than the one that trained it."
        )


@contextmanager
def _staged_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when the block ends well, every file durable before it does."""
    from safetensors import SafetensorError

    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        yield staging
        for path in staging.rglob("*"):
            fsync_file(path)  # a folder, too
        fsync_folder(staging)
        staging.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            out.rmdir()  # empty, as checked before
        staging.rename(out)
        fsync_folder(out.parent)
    except (OSError, SafetensorError) as error:
        cause = error if isinstance(error, OSError) else OSError(None, str(error))
        raise save_error(out, cause) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)

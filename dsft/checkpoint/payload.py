"""The model and optimizer state inside a checkpoint: DeepSpeed's own sharded files, written without swallowed errors.

DeepSpeed writes in place, hashes nothing, and a rank whose disk is full raises while the others wait for it in a
barrier. So its file writer is replaced during the save by one that hashes what it writes, puts it on the disk, and
remembers a failure until every rank has come through.

The files are pickles: load only checkpoints that you or people you trust have written.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsft.checkpoint.manifest import WrittenFile
from dsft.dist import without_prints
from dsft.errors import CheckpointError, SaveError
from dsft.fsio import HashedFile, fsync_file, hash_file, save_error, write_json

TAG = "deepspeed"
"""Folder of DeepSpeed's files inside a checkpoint."""
PAYLOAD_NAME = "payload.json"
BYTES_PER_PARAMETER = 12
"""fp32 master weight and Adam's two moments."""


def save_engine(engine: Any, folder: Path) -> Sequence[WrittenFile]:
    """Write this rank's part of a DeepSpeed engine's state into ``folder``. Collective.

    Returns:
        The files this rank wrote, hashed and fsynced.

    Raises:
        SaveError: this rank could not write; the other ranks have come through (``commit.save`` makes them agree).
    """
    writer = _RecordingWriter(engine.checkpoint_engine, folder)
    engine.checkpoint_engine = writer
    try:
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    except OSError as error:  # raised by DeepSpeed's own copying, before its closing gather and barrier
        writer.remember(folder, error)
        if engine._optimizer_has_ckpt_event_epilogue():
            engine.optimizer.checkpoint_event_epilogue()
        importlib.import_module("deepspeed.comm").barrier()
    finally:
        engine.checkpoint_engine = writer.original
    if writer.error is not None:
        raise writer.error
    _check_size(engine, writer.files, folder)
    files = [*writer.files, *_swapped_files(engine, folder)]
    if engine.global_rank == 0:
        write_json(folder / PAYLOAD_NAME, _describe(engine))
    return files


def load_engine(engine: Any, checkpoint: Path) -> None:
    """Load a verified checkpoint into a fresh engine: weights, masters and moments, bit by bit. Collective.

    Raises:
        CheckpointError: saved with another number of ranks or ZeRO stage, or for another model.
    """
    path = checkpoint / PAYLOAD_NAME
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}). Use an older checkpoint.") from error
    now = _describe(engine)
    for key, what in (("world_size", "{} ranks"), ("zero_stage", "ZeRO stage {}"), ("dtype", "weights in {}")):
        if saved[key] != now[key]:
            raise CheckpointError(
                f"{checkpoint} was saved with {what.format(saved[key])}, this run has {what.format(now[key])}. It is "
                "in DeepSpeed's sharded form, which loads only into the same set-up; start with the saved one, or use "
                "the checkpoint's weights alone (model.path)."
            )
    try:
        with without_prints():
            loaded, _ = engine.load_checkpoint(str(checkpoint), tag=TAG, load_module_strict=True)
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this model or its optimizer: {str(error).strip() or type(error).__name__}. "
            "Resume with the model and train section that saved it."
        ) from error
    if loaded is None:
        raise CheckpointError(f"DeepSpeed loaded nothing from {checkpoint / TAG}. Use an older checkpoint.")


def estimate_bytes(engine: Any) -> int:
    """About what :func:`save_engine` will write on this rank, for the free-space check."""
    trained, frozen = 0, 0
    num_ranks = int(engine.world_size)
    for parameter in engine.module.parameters():
        numel = int(getattr(parameter, "ds_numel", parameter.numel()))
        if parameter.requires_grad:
            trained += numel
        else:
            frozen += numel
    element_bytes = int(next(engine.module.parameters()).element_size())
    sharded = trained * BYTES_PER_PARAMETER // num_ranks
    if engine.zero_optimization_stage() == 3:
        return sharded + frozen * element_bytes // num_ranks
    return sharded + ((trained + frozen) * element_bytes if engine.global_rank == 0 else 0)


class _RecordingWriter:
    """Stands in for DeepSpeed's checkpoint engine during one save; never raises, so that no rank leaves the others."""

    def __init__(self, original: Any, folder: Path) -> None:
        self.original = original
        self.folder = folder
        self.files: list[WrittenFile] = []
        self.error: SaveError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; a failure is remembered."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.remember(Path(path), error)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file with torch.save, hashed and fsynced; a failure is remembered."""
        import torch

        if self.error is not None:
            return
        try:
            with HashedFile(Path(path)) as file:
                torch.save(state_dict, file)  # type: ignore[arg-type]  # asks for no more than write and flush
        except OSError as error:
            self.remember(Path(path), error)
        except RuntimeError as error:  # torch's zip writer, when the file below it has failed
            cause = error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error))
            self.remember(Path(path), cause)
        else:
            name = Path(path).relative_to(self.folder).as_posix()
            self.files.append(WrittenFile(name, file.num_bytes, file.sha256))

    def remember(self, path: Path, error: OSError) -> None:
        """Keep the first failure."""
        self.error = self.error or save_error(path, error)


def _describe(engine: Any) -> dict[str, Any]:
    return {
        "kind": "deepspeed",
        "world_size": engine.world_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": str(next(engine.module.parameters()).dtype).removeprefix("torch."),
        "deepspeed": version("deepspeed"),
        "torch": version("torch"),
    }


def _check_size(engine: Any, files: Sequence[WrittenFile], folder: Path) -> None:
    """DeepSpeed logs some failures and goes on: make sure that this rank's optimizer state really was written."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if partitions is None:
        partitions = getattr(engine.optimizer, "single_partition_of_fp32_groups", [])
    if engine.zero_nvme_offload_optimizer():
        return  # the state is in the swapped files
    least_bytes = sum(partition.numel() * 4 for partition in partitions)
    written_bytes = sum(file.num_bytes for file in files)
    if written_bytes < least_bytes:
        raise SaveError(
            f"DeepSpeed wrote {written_bytes:,} bytes into {folder / TAG} for rank {engine.global_rank}, whose fp32 "
            f"weights alone are {least_bytes:,}. The checkpoint was not committed; DeepSpeed's own message is above."
        )


def _swapped_files(engine: Any, folder: Path) -> list[WrittenFile]:
    """This rank's NVMe-offloaded tensors, which DeepSpeed copies as files."""
    if not engine.zero_nvme_offload_optimizer():
        return []
    files = []
    swapped = importlib.import_module("deepspeed.runtime.engine").dp_index_to_str(engine.global_rank)
    for path in sorted((folder / TAG / "offloaded_tensors" / f"rank{swapped}").rglob("*")):
        if path.is_file():
            fsync_file(path)
            files.append(WrittenFile(path.relative_to(folder).as_posix(), *hash_file(path)))
    return files

"""From the name a user gives to a checkpoint, and from a checkpoint to weights that a new run can start from."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dsft.checkpoint.discover import newest
from dsft.checkpoint.manifest import MANIFEST_NAME
from dsft.errors import CheckpointError
from dsft.export.hugging_face import export_checkpoint
from dsft.fsio import save_error

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"


def is_dsft_folder(path: Path) -> bool:
    """Whether ``path`` is a dsft checkpoint or the folder of a run (and not a Hugging Face folder or a hub name)."""
    return (path / MANIFEST_NAME).is_file() or (path / CHECKPOINTS_FOLDER).is_dir()


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that ``path`` names: itself, or the newest whole one of a run folder.

    Raises:
        CheckpointError: neither.
    """
    if (path / MANIFEST_NAME).is_file():
        return path
    found = newest(path / CHECKPOINTS_FOLDER) if (path / CHECKPOINTS_FOLDER).is_dir() else None
    if found is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint (a folder with {MANIFEST_NAME}) nor a run folder with a whole checkpoint "
            f"in {CHECKPOINTS_FOLDER}/. Name <run>/{CHECKPOINTS_FOLDER}/step-<number>, or the run's folder."
        )
    return found


def weights_folder(path: Path, cache_dir: Path | None = None, *, trust_remote_code: bool = False) -> Path:
    """An ordinary Hugging Face folder (fp32) with the weights of a checkpoint or of a run's newest checkpoint.

    It is exported once, into ``cache_dir`` or, by default, ``hf/`` in the run's folder, under a name that changes with
    the checkpoint's content. Any number of processes may ask at once: one exports, the others wait for it. It stays as
    long as a process that asked for it lives, and then until another checkpoint is exported there.

    Raises:
        CheckpointError: no whole checkpoint there, or a damaged one.
        SaveError: the folder cannot be written (give another ``cache_dir``).
    """
    checkpoint = checkpoint_of(path)
    content = hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest()[:12]
    folder = cache_dir if cache_dir is not None else checkpoint.resolve().parent.parent / "hf"
    out = folder / f"{checkpoint.name}-{content}"
    with _locked(out):
        if not out.is_dir():
            export_checkpoint(checkpoint, out, "fp32", trust_remote_code=trust_remote_code)
        if out not in _IN_USE:
            _IN_USE[out] = _open_beside(out, "used")
            fcntl.flock(_IN_USE[out], fcntl.LOCK_SH)
    for other in folder.glob("step-*"):
        if other != out:
            _remove_unless_used(other)
    return out


_IN_USE: dict[Path, TextIO] = {}
"""Exported folders that this process has asked for, each with a shared lock; the system releases it when it ends."""


def _remove_unless_used(exported: Path) -> None:
    """Remove an exported folder that no living process has asked for, this one neither."""
    with suppress(BlockingIOError), _locked(exported, wait=False), _open_beside(exported, "used") as used:
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(exported)
        logger.info("removed %s: weights of a checkpoint that no process uses any more", exported)


@contextmanager
def _locked(exported: Path, *, wait: bool = True) -> Iterator[None]:
    """Alone make, take or remove an exported folder. Raises BlockingIOError where that would mean to wait."""
    with _open_beside(exported, "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _open_beside(exported: Path, kind: str) -> TextIO:
    path = exported.with_name(f".{exported.name}.{kind}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w")
    except OSError as error:
        raise save_error(path, error) from error

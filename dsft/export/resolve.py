"""From the name a user gives to a checkpoint, and from a checkpoint to weights that a new run can start from."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft.checkpoint.discover import newest
from dsft.checkpoint.manifest import MANIFEST_NAME
from dsft.errors import CheckpointError
from dsft.export.hugging_face import export_checkpoint
from dsft.fsio import save_error

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
    the checkpoint's content. Any number of processes may ask at once: one exports, the others wait for it.

    Raises:
        CheckpointError: no whole checkpoint there, or a damaged one.
        SaveError: the folder cannot be written (give another ``cache_dir``).
    """
    checkpoint = checkpoint_of(path)
    content = hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest()[:12]
    folder = cache_dir if cache_dir is not None else checkpoint.resolve().parent.parent / "hf"
    out = folder / f"{checkpoint.name}-{content}"
    with _lock(folder, out.name):
        if not out.is_dir():
            export_checkpoint(checkpoint, out, "fp32", trust_remote_code=trust_remote_code)
    return out


@contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it when the process ends, however it ends."""
    path = folder / f".{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115  (closed below; the lock lives as long as it is open)
    except OSError as error:
        raise save_error(path, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

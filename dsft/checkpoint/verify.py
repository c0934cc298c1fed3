"""Is a checkpoint what was written? Checked before anything of it is used, and agreed by all ranks."""

from __future__ import annotations

import logging
from pathlib import Path

from dsft.checkpoint.discover import no_checkpoint, whole_checkpoints
from dsft.checkpoint.manifest import read_manifest
from dsft.dist import Groups
from dsft.errors import CheckpointError
from dsft.fsio import hash_file

logger = logging.getLogger(__name__)


def verify(checkpoint: Path, groups: Groups) -> None:
    """Compare size and hash of every file with the manifest. Collective.

    The files that rank w wrote are read by rank w modulo the number of ranks: at the same number of ranks each rank
    reads what it will load, and at any number every file is read once.

    Raises:
        CheckpointError: on every rank alike, naming the file and what is wrong with it.
    """
    groups.agree(find_damage(checkpoint, groups.rank, groups.size))


def newest_verified(folder: Path, groups: Groups) -> Path:
    """The newest checkpoint that is what was written; damaged ones are named in the log. Collective.

    Raises:
        CheckpointError: there is none, on every rank alike.
    """
    names: list[str] = groups.broadcast_object([path.name for path in whole_checkpoints(folder)])
    for name in names:
        try:
            verify(folder / name, groups)
        except CheckpointError as error:
            if groups.rank == 0:
                logger.warning("%s Going back to the checkpoint before it.", error)
            continue
        return folder / name
    raise no_checkpoint(folder)


def find_damage(checkpoint: Path, rank: int = 0, size: int = 1) -> CheckpointError | None:
    """What is wrong with rank ``rank``'s share of the files, or None. By default all files; not collective."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return error
    for writer, files in enumerate(manifest.files):
        if writer % size != rank:
            continue
        for file in files:
            path = checkpoint / file.name
            try:
                found_bytes = path.stat().st_size
                if found_bytes != file.num_bytes:
                    return CheckpointError(
                        f"{path} is damaged: {found_bytes:,} bytes long, {file.num_bytes:,} were written."
                    )
                if hash_file(path) != (file.num_bytes, file.sha256):
                    return CheckpointError(f"{path} is damaged: its content is not what was written (sha256).")
            except OSError as error:
                return CheckpointError(f"{path} cannot be read: {error.strerror or error}.")
    return None

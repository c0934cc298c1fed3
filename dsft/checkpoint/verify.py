"""Is a checkpoint what was written? And which is the newest that is? Agreed by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dsft.checkpoint.discover import checkpoints, no_checkpoint
from dsft.checkpoint.opened import OpenCheckpoint
from dsft.dist import Groups
from dsft.errors import CheckpointError, DamagedCheckpointError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def find_damage(checkpoint: Path) -> CheckpointError | None:
    """What is wrong with a checkpoint's files, or None. Reads all of them; not collective."""
    try:
        opened = OpenCheckpoint(checkpoint)
        for file in opened.files.values():
            opened.check_file(file)
    except CheckpointError as error:
        return error
    return None


def newest_usable(folder: Path, groups: Groups, use: Callable[[Path], Result]) -> Result:
    """What ``use`` makes of the newest checkpoint that is whole. Collective.

    A damaged one is named in the log and left for the one before it.

    Args:
        use: loads a checkpoint, or verifies it; raises DamagedCheckpointError on every rank alike when something in it
            is not what was written. Any other error is passed on.

    Raises:
        CheckpointError: there is no whole checkpoint, on every rank alike.
    """
    with groups.together():
        found = [path.name for path in checkpoints(folder)] if groups.rank == 0 else []
    names: list[str] = groups.broadcast_object(found)
    for name in names:
        try:
            return use(folder / name)
        except DamagedCheckpointError as error:
            if groups.rank == 0:
                logger.warning("%s Going back to the checkpoint before it.", error)
    raise no_checkpoint(folder)

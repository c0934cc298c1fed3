"""What is removed from the checkpoint folder: leftovers of saves that were cut off, and old checkpoints."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dsft.checkpoint.discover import whole_checkpoints
from dsft.checkpoint.manifest import step_of

logger = logging.getLogger(__name__)


def sweep(folder: Path) -> None:
    """Remove what saves and removals that were cut off left behind. Only the run's owner may call it."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            logger.info("removing %s, left by a save that was cut off", leftover)
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def retain(folder: Path, step: int, keep_last: int) -> None:
    """Keep the newest ``keep_last`` whole checkpoints up to ``step``, which has just been committed.

    Checkpoints of later steps belong to a line that the run has left (it went on from an older one): they are set
    aside under another name, so that no resume picks them up, and are never removed by dsft.
    """
    assert keep_last >= 1
    kept = 0
    for checkpoint in whole_checkpoints(folder):
        its_step = step_of(checkpoint)
        assert its_step is not None
        if its_step > step:
            _set_aside(checkpoint)
        elif kept < keep_last:
            kept += 1
        else:
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that a removal that is cut off leaves no partial checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed.tmp")
    if doomed.exists():
        shutil.rmtree(doomed)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _set_aside(checkpoint: Path) -> None:
    number = 0
    while (aside := checkpoint.with_name(f"superseded-{number}-{checkpoint.name}")).exists():
        number += 1
    checkpoint.rename(aside)
    logger.warning(
        "%s is of a later step than the one just saved: the run went on from an older checkpoint. It is kept as %s and "
        "will not be resumed from; delete it when you do not need it.",
        checkpoint,
        aside.name,
    )

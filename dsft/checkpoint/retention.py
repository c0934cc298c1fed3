"""What is removed from the checkpoint folder: leftovers of saves that were cut off, and old checkpoints."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsft.checkpoint.discover import load_state, whole_checkpoints
from dsft.checkpoint.manifest import step_of
from dsft.errors import CheckpointError

logger = logging.getLogger(__name__)

HELD_OUT_KEY = "held_out_loss"
"""In a checkpoint's state: the loss of each evaluation set that was measured at its step."""


def sweep(folder: Path) -> None:
    """Remove what saves and removals that were cut off left behind. Only the run's owner may call it."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            logger.info("removing %s, left by a save that was cut off", leftover)
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


@dataclass(frozen=True, slots=True)
class Keep:
    """Which whole checkpoints stay.

    Attributes:
        last: so many newest ones, at least 1.
        every_steps: besides, the first one of each so many steps.
        best: besides, the one with the lowest held-out loss of this evaluation set.
    """

    last: int
    every_steps: int | None = None
    best: str | None = None


def retain(folder: Path, step: int, keep: Keep) -> None:
    """Keep what ``keep`` says of the whole checkpoints up to ``step``, which has just been committed.

    Checkpoints of later steps belong to a line that the run has left (it went on from an older one): they are set
    aside under another name, so that no resume picks them up, and are never removed by dsft.
    """
    assert keep.last >= 1
    by_step = {step_of(checkpoint) or 0: checkpoint for checkpoint in whole_checkpoints(folder)}  # newest first
    for its_step in [one for one in by_step if one > step]:
        _set_aside(by_step.pop(its_step))
    kept = {*list(by_step)[: keep.last], *_first_of_each(by_step, keep.every_steps), *_best(by_step, keep.best)}
    for its_step in by_step.keys() - kept:
        remove(by_step[its_step])


def _first_of_each(steps: Iterable[int], every_steps: int | None) -> list[int]:
    """The first step in each interval, but for the one at the run's beginning."""
    if every_steps is None:
        return []
    first = {step // every_steps: step for step in sorted(steps, reverse=True)}
    return [step for number, step in first.items() if number > 0]


def _best(by_step: Mapping[int, Path], name: str | None) -> list[int]:
    """The step with the lowest held-out loss of the set, among those at which it was measured."""
    losses = {}
    for step, checkpoint in by_step.items() if name is not None else ():
        try:
            loss = load_state(checkpoint).get(HELD_OUT_KEY, {}).get(name)
        except CheckpointError:
            continue  # damaged: no resume would take it either
        if loss is not None:
            losses[step] = loss
    return [min(losses, key=lambda step: losses[step])] if losses else []


def set_aside_after(folder: Path, step: int) -> None:
    """Set aside what was saved after ``step``: the run goes on from there by request, and will save other steps.

    Before anything is trained: if the new line ended before its first save, ``auto`` would find the one left behind.
    """
    for checkpoint in whole_checkpoints(folder):
        its_step = step_of(checkpoint)
        assert its_step is not None
        if its_step > step:
            _set_aside(checkpoint)


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
        "%s is of a later step than where the run goes on, or of another line of it. It is kept as %s and will not be "
        "resumed from; delete it when you do not need it.",
        checkpoint,
        aside.name,
    )

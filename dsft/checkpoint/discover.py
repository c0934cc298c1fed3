"""Finding checkpoints. A checkpoint is whole when it has a readable manifest; ``latest`` is only for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsft.checkpoint.manifest import STATE_NAME, read_manifest, step_of
from dsft.errors import CheckpointError


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a run's checkpoint folder, newest step first. Partial ones are passed over."""
    if not folder.is_dir():
        return []
    found = []
    for checkpoint in folder.iterdir():
        step = step_of(checkpoint)
        if step is None:
            continue
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError:
            continue
        if manifest.step == step:
            found.append((step, checkpoint))
    return [checkpoint for _, checkpoint in sorted(found, reverse=True)]


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; None when there is none."""
    return next(iter(whole_checkpoints(folder)), None)


def require_newest(folder: Path) -> Path:
    """As :func:`newest`, where a resume was asked for.

    Raises:
        CheckpointError: there is none (a resume never becomes a fresh start by itself).
    """
    found = newest(folder)
    if found is None:
        raise no_checkpoint(folder)
    return found


def no_checkpoint(folder: Path) -> CheckpointError:
    """The error of a resume without anything to resume from."""
    partial = sorted(path.name for path in folder.iterdir() if step_of(path) is not None) if folder.is_dir() else []
    seen = f"only {', '.join(partial)}, damaged or never committed" if partial else "no checkpoint"
    return CheckpointError(
        f"a resume was asked for, but {folder} holds {seen}. Check run.dir, or start without --resume to train from "
        "the beginning."
    )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint (step, tokens, cursor, configuration, versions, ...).

    Raises:
        CheckpointError: the file is absent or is not JSON.
    """
    path = checkpoint / STATE_NAME
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}). Use an older checkpoint.") from error
    assert isinstance(state, dict)
    return state

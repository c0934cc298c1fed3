"""Finding checkpoints. A checkpoint is whole when it has a readable manifest; ``latest`` is only for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsft.checkpoint.manifest import STATE_NAME, read_manifest, step_of
from dsft.checkpoint.opened import OpenCheckpoint
from dsft.errors import CheckpointError


def checkpoints(folder: Path) -> list[Path]:
    """All that are named like a checkpoint in a run's checkpoint folder, newest step first, damaged ones too."""
    found = [(step_of(path), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)][::-1]


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a readable manifest, newest step first."""
    found = []
    for checkpoint in checkpoints(folder):
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError:
            continue
        if manifest.step == step_of(checkpoint):
            found.append(checkpoint)
    return found


def newest(folder: Path) -> Path | None:
    """The newest checkpoint with a readable manifest; None when there is none."""
    return next(iter(whole_checkpoints(folder)), None)


def no_checkpoint(folder: Path) -> CheckpointError:
    """The error of a resume without anything to resume from."""
    partial = [path.name for path in checkpoints(folder)]
    seen = f"only {', '.join(partial)}, damaged or never committed" if partial else "no checkpoint"
    return CheckpointError(
        f"a resume was asked for, but {folder} holds {seen}. Check run.dir, or start without --resume to train from "
        "the beginning."
    )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint (step, tokens, cursor, configuration, versions, ...).

    Raises:
        DamagedCheckpointError: it is not what was written.
    """
    state = json.loads(OpenCheckpoint(checkpoint).read(STATE_NAME))
    assert isinstance(state, dict)
    return state

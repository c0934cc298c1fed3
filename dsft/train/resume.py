"""Going on from a checkpoint: which one, whether it is of this run, and what has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.checkpoint.discover import load_state, newest
from dsft.checkpoint.payload import load_engine
from dsft.checkpoint.verify import newest_verified, verify
from dsft.config.load import config_differences
from dsft.errors import CheckpointError, ConfigError
from dsft.train.attempts import Origin
from dsft.train.state import TrainState, state_from_json

if TYPE_CHECKING:
    from dsft.dist import Groups
    from dsft.metrics.recorder import Recorder
    from dsft.sampling.types import Cursor
    from dsft.train.saving import Saver

HYPER_PARAMETERS = ("betas", "eps", "weight_decay")
MODEL_KEYS = ("model.path", "model.revision", "model.config", "model.dtype", "train.freeze")


def find_checkpoint(resume: str | None, checkpoints: Path, groups: Groups) -> Path | None:
    """The verified checkpoint to start from; None for a fresh start. Collective.

    Raises:
        CheckpointError: one was asked for and there is none that is whole.
        ConfigError: none was asked for, but the run folder has checkpoints: a fresh start would mix two runs.
    """
    if resume is None:
        existing = newest(checkpoints) if groups.rank == 0 else None
        name = groups.broadcast_object(None if existing is None else existing.name)
        if name is not None:
            raise ConfigError(
                f"{checkpoints} already holds {name}. Give --resume auto to go on from it, or another run.dir for a "
                "fresh start."
            )
        return None
    if resume == "auto":
        return newest_verified(checkpoints, groups)
    verify(Path(resume), groups)
    return Path(resume)


def check_state(saved: dict[str, Any], identity: dict[str, Any], *, allow_data_change: bool) -> list[str]:
    """Compare a checkpoint's state with this start; returns one line a harmless change.

    Args:
        saved: ``state.json`` of the checkpoint.
        identity: what this start would save (``dsft.train.saving.Saver.identity``).
        allow_data_change: go on although the data order changes.

    Raises:
        ConfigError: a change alters which documents the remaining steps train on, and it was not allowed.
        CheckpointError: the checkpoint is of another model.
    """
    changed = config_differences(saved["config"], identity["config"])
    for difference in changed:
        if difference.key.startswith(MODEL_KEYS):
            raise CheckpointError(
                f"the checkpoint was trained with {difference.key} = {difference.old!r}, this start has "
                f"{difference.new!r}. Use the old value, or start a new run with model.path set to the checkpoint."
            )
    reasons = [f"{d.key}: {d.old!r} -> {d.new!r}" for d in changed if d.changes_data_order]
    old_stores, new_stores = saved["stores"], identity["stores"]
    reasons += [
        f"token store of {name}: {old_stores.get(name)} -> {new_stores.get(name)} (other tokens)"
        for name in sorted(old_stores.keys() | new_stores.keys())
        if old_stores.get(name) != new_stores.get(name)
    ]
    if reasons and not allow_data_change:
        raise ConfigError(
            f"this start would train on other data than the checkpoint's run: {'; '.join(reasons)}. Undo the change, "
            "or give --allow-data-change to go on from the same position in the changed order."
        )
    return [f"{d.key}: {d.old!r} -> {d.new!r}" for d in changed if not d.changes_data_order] + reasons


def restore(
    resume: str | None,
    saver: Saver,
    engine: Any,
    groups: Groups,
    recorder: Recorder,
    start: Cursor,
    *,
    allow_data_change: bool,
) -> tuple[TrainState, Origin | None]:
    """The state to begin with, with the engine's weights and optimizer loaded when it is a checkpoint's. Collective.

    Returns:
        The state, and where it is from; None for a fresh start.

    Raises:
        CheckpointError, ConfigError: as :func:`find_checkpoint` and :func:`check_state`.
    """
    checkpoint = find_checkpoint(resume, saver.folder, groups)
    if checkpoint is None:
        return TrainState(cursor=start), None
    with groups.together():
        saved = load_state(checkpoint)
        changes = check_state(saved, saver.identity, allow_data_change=allow_data_change)
        state = state_from_json(saved["train"])
    for line in changes:
        recorder.warn(f"changed since the checkpoint: {line}")
    _load_engine(engine, checkpoint)
    if checkpoint.resolve().parent == saver.folder.resolve():
        saver.saved_step = state.step
    recorder.write("resume", {"step": state.step, "path": str(checkpoint), "from_attempt": saved["attempt"]})
    return state, Origin(checkpoint, saved["attempt"])


def _load_engine(engine: Any, checkpoint: Path) -> None:
    """Load weights and optimizer state; the hyper-parameters stay those of this start.

    DeepSpeed's loading would put back the saved ones, and what the user has changed would be ignored in silence.
    """
    optimizer = engine.optimizer
    ours = [{key: group[key] for key in HYPER_PARAMETERS} for group in optimizer.param_groups]
    load_engine(engine, checkpoint)
    for group, values in zip(optimizer.param_groups, ours, strict=True):
        group.update(values)
    optimizer.clip_grad = engine.gradient_clipping()

"""Going on from a checkpoint: which one, whether it is of this run, and what has changed since."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.checkpoint.discover import load_state, newest
from dsft.checkpoint.manifest import step_of
from dsft.checkpoint.payload import check_engine, load_engine
from dsft.checkpoint.retention import set_aside_after
from dsft.checkpoint.verify import newest_usable
from dsft.config.load import config_differences
from dsft.errors import CheckpointError, ConfigError
from dsft.train.attempts import Origin, Passed, passed_after
from dsft.train.growth import growth_lines, sources_before
from dsft.train.roll_back import pass_over
from dsft.train.schedule import Position
from dsft.train.state import TrainState, state_from_json
from dsft.train.store_identity import changed_stores

if TYPE_CHECKING:
    from dsft.dist import Groups
    from dsft.metrics.recorder import Recorder
    from dsft.sampling.types import Cursor
    from dsft.store.reader import SourceStore
    from dsft.train.saving import Saver
    from dsft.train.schedule import Schedule

MODEL_KEYS = ("model.path", "model.revision", "model.config", "model.dtype", "train.freeze")


def _refuse_to_mix(checkpoints: Path, groups: Groups) -> None:
    """A fresh start in a folder that has checkpoints would mix two runs. Collective."""
    with groups.together():
        existing = newest(checkpoints) if groups.rank == 0 else None
    name = groups.broadcast_object(None if existing is None else existing.name)
    if name is not None:
        raise ConfigError(
            f"{checkpoints} already holds {name}. Give --resume auto to go on from it, or another run.dir for a fresh "
            "start."
        )


def with_any(resume: str | None, checkpoints: Path, groups: Groups) -> str | None:
    """``if-any`` is ``auto`` where the run has a checkpoint, whole or not, else a fresh start. Collective."""
    if resume != "if-any":
        return resume
    has_any = False
    with groups.together():
        if groups.rank == 0:
            has_any = checkpoints.is_dir() and any(step_of(path) is not None for path in checkpoints.iterdir())
    answer: str | None = groups.broadcast_object("auto" if has_any else None)
    return answer


def check_state(
    saved: dict[str, Any], identity: dict[str, Any], kept: Collection[str] = (), *, allow_data_change: bool
) -> list[str]:
    """Compare a checkpoint's state with this start; returns one line a harmless change.

    Args:
        saved: ``state.json`` of the checkpoint.
        identity: what this start would save (``dsft.train.saving.Saver.identity``).
        kept: sources whose first shards are those of the checkpoint (``dsft.train.growth``).
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
    reasons += changed_stores(saved, identity, kept)
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
    schedule: Schedule,
    stores: Mapping[str, SourceStore],
    *,
    allow_data_change: bool,
    allow_lr_jump: bool,
) -> tuple[TrainState, Origin | None]:
    """The state to begin with, with the engine's weights and optimizer loaded when it is a checkpoint's. Collective.

    Args:
        stores: of the sources, by name.

    Nothing of a checkpoint is used before all ranks have found all of it to be what was written; with ``auto``, a
    damaged one is left for the one before it. An imported one gives weights and optimizer state to a fresh start.

    Returns:
        The state, and where it is from; None for a fresh start.

    Raises:
        CheckpointError: one was asked for and there is none that is whole, or it is of another model.
        ConfigError: none was asked for, but the run folder has checkpoints; or as :func:`check_state`
            and ``Schedule.check_no_jump``.
    """
    with groups.together():
        check_engine(engine)
    if resume is None:
        _refuse_to_mix(saver.folder, groups)
        return TrainState(cursor=start), None

    def load(checkpoint: Path) -> tuple[Path, dict[str, Any], list[str], TrainState]:
        changes, state = [], TrainState(cursor=start)
        with groups.together():
            saved = load_state(checkpoint)
            if "imported_from" not in saved:
                kept = sources_before(saved, stores)
                changes = check_state(saved, saver.identity, kept, allow_data_change=allow_data_change)
                state = state_from_json(saved["train"])
                if not allow_lr_jump:
                    schedule.check_no_jump(Position(state.step, state.tokens_trained), state.lr_share)
        load_engine(engine, checkpoint, groups, saver.disk)
        return checkpoint, saved, changes, state

    loaded = newest_usable(saver.folder, groups, load) if resume == "auto" else load(Path(resume))
    checkpoint, saved, changes, state = loaded
    if "imported_from" in saved:
        _refuse_to_mix(saver.folder, groups)
        recorder.warn(
            f"weights and optimizer state are those of {saved['imported_from']}; data and schedule begin anew"
        )
        return state, None
    before = sources_before(saved, stores)
    for line in changes + growth_lines(stores, before):
        recorder.warn(f"changed since the checkpoint: {line}")
    if saved["world_size"] != groups.size:
        recorder.warn(
            f"the checkpoint was saved by {saved['world_size']} ranks, this start has {groups.size}: it goes on with "
            "the same documents, and the same losses up to the rounding of sums"
        )
    is_own = checkpoint.resolve().parent == saver.folder.resolve()
    passed = None
    if is_own:
        saver.saved_step = state.step
        passed = _pass_over(saver.folder, groups, recorder, saved, state)
    if resume != "auto":
        with groups.together():
            if groups.rank == 0:
                set_aside_after(saver.folder, state.step if is_own else -1)
    recorder.write("resume", {"step": state.step, "path": str(checkpoint), "from_attempt": saved["attempt"]})
    return state, Origin(checkpoint, saved["attempt"], passed, before)


def _pass_over(
    folder: Path, groups: Groups, recorder: Recorder, saved: dict[str, Any], state: TrainState
) -> Passed | None:
    """Leave out the data that the run had decided to pass over after this checkpoint. Collective."""
    with groups.together():  # what rank 0 reads: on a network file system another host may see an older file
        found = passed_after(folder.parent, saved["attempt"], state.step) if groups.rank == 0 else None
    values = groups.broadcast_object(None if found is None else asdict(found))
    if values is None:
        return None
    passed = Passed(**values)
    tokens = passed.tokens - state.tokens_trained
    pass_over(state, passed)
    recorder.warn(f"{tokens:,} tokens of the plan are passed over after step {state.step}: {passed.cause}")
    return passed

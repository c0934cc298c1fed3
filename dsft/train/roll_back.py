"""Going back to a checkpoint of before a loss spike, and on with the data that comes after it.

The weights, the optimizer and the counters become those of the checkpoint; the position in the data stays where the
spike was seen. So step numbers go on from the checkpoint's, and a part of the plan is passed over. What was passed
over is written down with the attempt that begins there (``attempts.jsonl``), before its first step: a run that dies
then goes on in the same way, and ``dsft data verify-run`` knows that the part was left out on purpose.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.checkpoint.discover import load_state, whole_checkpoints
from dsft.checkpoint.manifest import step_of
from dsft.checkpoint.payload import load_engine
from dsft.checkpoint.retention import set_aside_after
from dsft.checkpoint.verify import newest_usable
from dsft.errors import TrainingError
from dsft.sampling.cursor import cursor_from_json, cursor_to_json
from dsft.train.attempts import Passed, append_attempt
from dsft.train.state import TrainState, state_from_json

if TYPE_CHECKING:
    from dsft.train.loop import Run


@dataclass(frozen=True, slots=True)
class Spike:
    """Why a run goes back.

    Attributes:
        first_step: of the steps whose loss was high or not finite.
        cause: for a person.
    """

    first_step: int
    cause: str


def pass_over(state: TrainState, passed: Passed) -> None:
    """Move a state just loaded from a checkpoint to the data that comes after what is passed over."""
    state.tokens_skipped += passed.tokens - state.tokens_trained
    state.cursor, state.tokens_trained = cursor_from_json(passed.cursor), passed.tokens
    state.num_roll_backs = passed.num_roll_backs


def roll_back(run: Run, state: TrainState, spike: Spike) -> None:
    """Load a checkpoint of before the spike into the engine and ``state``; no save is in flight. Collective.

    Raises:
        TrainingError: the run has gone back often enough, or there is no checkpoint of before the spike.
        CheckpointError: none of them is whole.
    """
    assert run.spikes is not None
    _check_allowed(run, state, spike)
    folder = run.saver.folder
    with run.groups.together():
        if run.groups.rank == 0:
            set_aside_after(folder, _choose(run, folder, spike))

    def load(checkpoint: Path) -> tuple[Path, dict[str, Any], TrainState]:
        with run.groups.together():
            saved = load_state(checkpoint)
            loaded = state_from_json(saved["train"])
        load_engine(run.engine, checkpoint, run.groups, run.saver.disk)
        return checkpoint, saved, loaded

    checkpoint, saved, loaded = newest_usable(folder, run.groups, load)
    passed = Passed(
        cursor=cursor_to_json(state.cursor),
        tokens=state.tokens_trained,
        num_roll_backs=state.num_roll_backs + 1,
        cause=f"steps {spike.first_step} to {state.step}: {spike.cause}",
    )
    last_step = state.step
    pass_over(loaded, passed)
    state.become(loaded)
    attempt = replace(
        run.attempt,
        id=str(run.groups.broadcast_object(uuid.uuid4().hex)),
        step=state.step,
        from_attempt=saved["attempt"],
        checkpoint=str(checkpoint.absolute()),
        passed=passed,
    )
    with run.groups.together():
        if run.groups.rank == 0:
            append_attempt(run.folder.path, attempt)
        run.recorder.begin(state.step)
        run.folder.set_checkpoint(checkpoint, state.step)
        run.folder.write_state("running", state.step)
    run.saver.begin_attempt(attempt.id, state.step)
    run.step_log.begin_attempt(attempt.id)
    run.evaluation.go_back(state)
    run.spikes.restore(state.spikes)
    run.recorder.write("resume", {"step": state.step, "path": str(checkpoint), "from_attempt": saved["attempt"]})
    run.recorder.warn(
        f"loss spike: {passed.cause}. The run goes back from step {last_step} to the checkpoint of step {state.step} "
        f"({state.num_roll_backs} of {run.spikes.section.max_roll_backs} times), and on with the data after it: "
        f"{state.tokens_skipped:,} tokens of the plan are passed over so far"
    )


def _check_allowed(run: Run, state: TrainState, spike: Spike) -> None:
    assert run.spikes is not None
    limit = run.spikes.section.max_roll_backs
    if state.num_roll_backs < limit:
        return
    raise TrainingError(
        f"loss spike in steps {spike.first_step} to {state.step} ({spike.cause}), and the run has gone back {limit} "
        "times already (train.spikes.max_roll_backs). Passing over data does not help it: lower train.lr or raise "
        "weight decay, look at the data of these steps, or raise deviations if this is no spike; then resume from the "
        "newest checkpoint."
    )


def _choose(run: Run, folder: Path, spike: Spike) -> int:
    """Step of the checkpoint to go back to: the newest that is old enough, else the oldest of before the spike."""
    assert run.spikes is not None
    steps = [step for step in map(step_of, whole_checkpoints(folder)) if step is not None and step < spike.first_step]
    if not steps:
        raise TrainingError(
            f"loss spike from step {spike.first_step} on ({spike.cause}), and {folder} holds no checkpoint of before "
            "it. Save more often (checkpoint.every_steps), keep more (checkpoint.keep_last), or lower train.lr, and "
            "start again."
        )
    old_enough = [step for step in steps if step < spike.first_step - run.spikes.section.rewind_steps]
    return max(old_enough, default=min(steps))

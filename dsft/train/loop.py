"""The training loop, top to bottom on one screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsft.batch.loader import Loader
from dsft.batch.types import StepBatch
from dsft.checkpoint.manifest import checkpoint_name
from dsft.dist import Groups
from dsft.errors import DataError, SaveError, TrainingError
from dsft.launch.owner import RunFolder
from dsft.launch.progress import Progress
from dsft.launch.stop import StopFlag
from dsft.launch.watch import standing
from dsft.metrics.recorder import Recorder
from dsft.train.attempts import Attempt
from dsft.train.control import Proposal, agree, propose
from dsft.train.evaluation import EvaluationPlan
from dsft.train.profiling import Profiler
from dsft.train.roll_back import Spike, roll_back
from dsft.train.saving import Saver
from dsft.train.schedule import Position, Schedule
from dsft.train.slow_ranks import SlowRanks
from dsft.train.spikes import SpikeWatch
from dsft.train.state import TrainState
from dsft.train.step import StepResult, train_step
from dsft.train.step_log import StepLog


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a run is made of; built by ``dsft.train.setup`` and only read from here on.

    Attributes:
        attempt: with which this start began.
        spikes: None: the run does not go back when its loss spikes.
    """

    engine: Any
    groups: Groups
    loader: Loader
    schedule: Schedule
    saver: Saver
    evaluation: EvaluationPlan
    recorder: Recorder
    step_log: StepLog
    folder: RunFolder
    stop: StopFlag
    progress: Progress
    profiler: Profiler
    attempt: Attempt
    spikes: SpikeWatch | None
    slow_ranks: SlowRanks
    seed: int
    salt: int
    source_names: tuple[str, ...]
    log_every_steps: int
    max_steps: int | None
    max_skipped_steps: int


def train(run: Run, state: TrainState) -> str:
    """Train from ``state`` to the end of the data, ``max_steps``, a stop request or an early stop.

    Returns:
        ``finished``, ``stopped`` (on request) or ``early_stop`` (overfitting, forgetting), with the state saved; or
        ``out_of_time``: stopped on request, with too little time left to save.
    """
    batches = run.loader.steps(state.cursor)
    run.progress.begin("evaluate", state.step)
    outcome: str | None = run.evaluation.at_start(run, state)
    run.step_log.begin()
    proposal = _propose_next(run, batches)
    while outcome is None and (run.max_steps is None or state.step < run.max_steps):
        run.progress.begin("step", state.step)
        agreed = agree(run.groups, proposal)
        if agreed.end or agreed.stop:
            outcome = "stopped" if agreed.stop and not agreed.end else "finished"
            break
        _go_on_saving(run, agreed.num_save_tasks_done, state)
        batch, proposal = proposal.batch, _propose_next(run, batches)
        assert batch is not None, "an agreed step has a batch on every rank"
        lr = run.schedule.lr_at(Position(state.step, state.tokens_trained))
        with run.profiler.step(state.step):
            result = train_step(
                run.engine,
                batch,
                agreed,
                run.saver,
                lr=lr,
                num_ranks=run.groups.world.size,
                num_sources=len(run.source_names),
                seed=run.seed,
                step=state.step,
            )
        _advance(run, state, batch, agreed.num_supervised, result)
        run.step_log.add(state.step, batch.plan, agreed, result, lr)
        run.slow_ranks.observe(state.step, batch)
        spike = _look_for_spike(run, state, batch, result)
        if spike is not None:
            _go_back(run, state, spike, proposal)
            batches = run.loader.steps(state.cursor)
            proposal = _propose_next(run, batches)
            continue
        evaluate, save = run.evaluation.due(state, batch), _is_save_due(run, state)
        if state.step % run.log_every_steps == 0 or evaluate or save:  # both need the training loss up to here
            _write_steps(run, state)
        if evaluate:
            run.progress.begin("evaluate", state.step)
            outcome = run.evaluation.measure(run, state)
        if save and outcome is None:
            _begin_save(run, state)
    outcome = outcome or "finished"
    _write_steps(run, state)
    _finish_saving(run, state)
    if outcome == "stopped" and not _has_time_to_save(run, state):
        outcome = "out_of_time"
    else:
        _save(run, state)  # first of all: who asked to stop may not wait for an evaluation
    if outcome in ("finished", "early_stop"):
        run.progress.begin("evaluate", state.step)
        outcome = "stopped" if run.evaluation.at_end(run, state) == "stopped" else outcome
    run.progress.begin("end", state.step)
    run.groups.agree(run.recorder.error or run.step_log.error)
    return outcome


def _propose_next(run: Run, batches: Iterator[StepBatch]) -> Proposal:
    """Take the next prefetched batch and post this rank's message for it; an error travels in the message."""
    batch: StepBatch | None = None
    error: Exception | None = None
    try:
        batch = next(batches, None)
    except OSError as caught:
        error = DataError(f"reading training data failed: {caught}. Check the store's disk.")
    except Exception as caught:  # noqa: BLE001  (whatever it is, no rank may wait for one that is gone)
        error = caught
    error = error or run.recorder.error or run.step_log.error
    return propose(
        run.groups,
        batch,
        error,
        stop=run.stop.requested is not None,
        num_save_tasks_done=run.saver.num_tasks_done,
        salt=run.salt,
    )


def _begin_save(run: Run, state: TrainState) -> None:
    run.progress.begin("save", state.step)
    run.saver.begin(run, state)
    _note_checkpoint(run, state)


def _go_on_saving(run: Run, num_tasks_done: int, state: TrainState) -> None:
    run.saver.go_on(run, num_tasks_done)
    _note_checkpoint(run, state)


def _finish_saving(run: Run, state: TrainState) -> None:
    run.progress.begin("save", state.step)
    run.saver.finish(run)
    _note_checkpoint(run, state)


def _save(run: Run, state: TrainState) -> None:
    run.progress.begin("save", state.step)
    run.saver.save(run, state)
    _note_checkpoint(run, state)


def _note_checkpoint(run: Run, state: TrainState) -> None:
    """Say in ``run_state.json`` which checkpoint stands, when it is another one than before."""
    step = run.saver.saved_step
    if step is None or step == run.folder.checkpoint_step:
        return
    run.folder.set_checkpoint(run.saver.folder / checkpoint_name(step), step)
    try:
        run.folder.write_state("running", state.step)
    except SaveError as error:  # the checkpoint is whole all the same
        run.recorder.warn(str(error))


def _has_time_to_save(run: Run, state: TrainState) -> bool:
    """Whether a save as long as the last one fits before the first rank's deadline. Collective, same answer everywhere.

    Without an older checkpoint it is tried anyway: there is nothing to lose.
    """
    everyones = run.groups.all_gather_object([run.stop.seconds_left(), run.progress.save_seconds])
    left = min((left for left, _ in everyones if left is not None), default=None)
    needed = max((seconds for _, seconds in everyones if seconds is not None), default=None)
    if left is None or needed is None or left > needed or run.saver.saved_step in (None, state.step):
        return True
    run.recorder.warn(
        f"step {state.step} is not saved: {max(left, 0.0):.1f} s are left until this run is killed, and the last save "
        f"took {needed:.1f} s; {standing(run.saver.saved_step)}"
    )
    return False


def _advance(run: Run, state: TrainState, batch: StepBatch, num_supervised: int, result: StepResult) -> None:
    state.step += 1
    state.cursor = batch.plan.cursor_after
    state.tokens_trained = batch.plan.tokens_trained
    state.supervised_trained += num_supervised
    state.lr_share = run.schedule.share_at(Position(state.step, state.tokens_trained))
    state.num_skipped += not result.applied
    state.num_skipped_in_row = 0 if result.applied else state.num_skipped_in_row + result.not_finite


def _look_for_spike(run: Run, state: TrainState, batch: StepBatch, result: StepResult) -> Spike | None:
    """Why the run must go back, if it must. Collective where ``train.spikes`` is set; same answer on every rank.

    Raises:
        TrainingError: too many steps in a row were not finite, and the run may not go back.
    """
    too_many = not result.applied and _count_skipped(run, state, result)
    if run.spikes is None:
        if too_many:
            raise _not_finite_error(run, state, batch)
        return None
    watch = run.spikes
    weighted, weights = run.groups.sum(result.source_loss.sum(1).cpu().numpy())
    limit, loss = watch.limit, weighted / weights if weights > 0.0 else None
    watch.observe(state.step, batch.plan.stage, loss, not_finite=result.not_finite)
    state.spikes = watch.to_json()
    if watch.first_step is None or not (too_many or watch.is_spike):
        return None
    cause = f"loss {loss:.4g}, limit {limit:.4g}" if watch.is_spike else "loss or gradient was not finite"
    return Spike(watch.first_step, cause)


def _go_back(run: Run, state: TrainState, spike: Spike, proposal: Proposal) -> None:
    """To a checkpoint of before the spike. The message for the next step is answered first: all ranks have sent it."""
    _write_steps(run, state)
    agree(run.groups, proposal)
    _finish_saving(run, state)
    run.progress.begin("start", state.step)
    roll_back(run, state, spike)


def _is_save_due(run: Run, state: TrainState) -> bool:
    """Not while the loss is high: that checkpoint would be the newest, and have what the run may have to leave."""
    is_due = run.saver.due(state)
    if not is_due or run.spikes is None or run.spikes.first_step is None:
        return is_due
    run.recorder.warn(
        f"step {state.step} is not saved: the loss is high, or not finite, since step {run.spikes.first_step}"
    )
    return False


def _count_skipped(run: Run, state: TrainState, result: StepResult) -> bool:
    """Say a skipped step loudly; returns whether there were too many in a row. Same answer on every rank."""
    cause = "loss or gradient was not finite" if result.not_finite else "none of its tokens is supervised"
    run.recorder.warn(f"step {state.step}: no update, {cause} ({state.num_skipped} steps without an update so far)")
    return state.num_skipped_in_row >= run.max_skipped_steps


def _not_finite_error(run: Run, state: TrainState, batch: StepBatch) -> TrainingError:
    documents = sorted(
        {
            f"{run.source_names[source]}/{shard}/{document}"
            for pack in batch.plan.packs
            for source, shard, document in zip(
                pack.source.tolist(), pack.shard.tolist(), pack.document.tolist(), strict=True
            )
        }
    )
    return TrainingError(
        f"{state.num_skipped_in_row} steps in a row had a loss or gradient that is not finite; the last is step "
        f"{state.step}. Its documents (source/shard/number in the shard, from 0): {', '.join(documents[:50])}"
        f"{' and more' if len(documents) > 50 else ''}. Lower train.lr and resume from the last checkpoint, or "
        "look at these documents: the manifest.json of a source's token store names the raw file of each shard."
    )


def _write_steps(run: Run, state: TrainState) -> None:
    """Write the record of the steps since the last one, if there are any. Collective."""
    if run.step_log.is_empty:
        return
    record = run.step_log.record(run.loader.wait_seconds)
    counters = {
        "step": state.step,
        "tokens_trained": state.tokens_trained,
        "supervised_trained": state.supervised_trained,
        "num_skipped": state.num_skipped,
    }
    run.evaluation.watch_training(state, record)
    run.recorder.write("step", {**counters, **record})

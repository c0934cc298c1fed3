"""When a run saves, and what it hands to the commit protocol. One save is in flight at most, while training goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.checkpoint.commit import PendingSave, begin
from dsft.checkpoint.local_disk import LocalDisk
from dsft.checkpoint.manifest import WrittenFile
from dsft.checkpoint.retention import HELD_OUT_KEY, Keep
from dsft.checkpoint.snapshot import Snapshot, SnapshotMemory
from dsft.config.models import CheckpointSection
from dsft.constants import CHECKPOINT_VERSION, ORDER_VERSION
from dsft.errors import SaveError
from dsft.launch.progress import Progress
from dsft.train.save_interval import SaveInterval
from dsft.train.state import TrainState
from dsft.train.step_log import StepLog

if TYPE_CHECKING:
    from dsft.train.loop import Run

ABANDON_SECONDS = 5.0
"""How long a run that fails waits for its writer: a thread that still runs while the process ends might crash it."""


class Saver:
    """Checkpoints of a run.

    A save begins after a step, is written by a thread while the next steps are computed, and is committed when all
    ranks know from the control message that all have written. The threads make no collective calls.

    Args:
        section: how often, and how many are kept.
        folder: ``<run>/checkpoints``.
        disk: of this host, for the shards (``checkpoint.local_dir``).
        model_folder: ``<run>/model``: config, tokenizer and chat template, copied into each checkpoint so that it
            can be exported without the run.
        attempt: id of this start of the run.
        identity: what a resume compares: resolved configuration, store fingerprints, world size.
        step_log: whose rates leave out the time for which training stood still.
        progress: of this rank: it is in phase ``save`` while it waits for its writer, and not hung.

    Attributes:
        folder, disk, identity: as given.
        saved_step: step of the last checkpoint of this start, or of the one it went on from.
    """

    def __init__(
        self,
        section: CheckpointSection,
        folder: Path,
        disk: LocalDisk | None,
        model_folder: Path,
        attempt: str,
        identity: dict[str, Any],
        step_log: StepLog,
        progress: Progress,
    ) -> None:
        self.folder = folder
        self.disk = disk
        self.identity = identity
        self.saved_step: int | None = None
        self._section = section
        self._model_folder = model_folder
        self._attempt = attempt
        self._step_log = step_log
        self._progress = progress
        self._interval = SaveInterval(section.every_steps)
        self._memory = SnapshotMemory(section.snapshot_bytes)
        self._pending: PendingSave | None = None
        self._snapshot: Snapshot | None = None
        self._num_failed_in_row = 0
        self._num_tasks = 0
        self._stall_seconds = 0.0
        self._began_at = 0.0  # on a clock that stands still while training does

    def due(self, state: TrainState) -> bool:
        """Whether the step that was just taken ends an interval."""
        return self._interval.is_due(state.step)

    def begin_attempt(self, attempt: str, saved_step: int) -> None:
        """The run has gone back to the checkpoint of ``saved_step``; no save is in flight."""
        assert self._pending is None
        self._attempt, self.saved_step = attempt, saved_step
        self._interval.go_back(saved_step)

    # ------------------------------------------------------------------------------------------------ while training

    @property
    def num_tasks_done(self) -> int:
        """Tasks (to write, to publish) that this rank's threads have ended since the start. It rides on the control
        message; tasks begin at the same places on all ranks, so they have the same numbers.
        """
        is_busy = self._pending is not None and not self._pending.is_idle
        return self._num_tasks - is_busy

    def begin(self, run: Run, state: TrainState) -> None:
        """Begin to save the present state, once the save before it has ended. Collective.

        A save that fails, now or later, fails on every rank, so all of them count alike. Training goes on after it.

        Raises:
            SaveError: ``checkpoint.max_failed_saves`` saves in a row have failed.
        """
        self.finish(run)
        if state.step == self.saved_step:
            return
        try:
            self._begin(run, state)
        except SaveError as error:
            self._count_failure(run, state.step, error)

    def go_on(self, run: Run, num_tasks_done: int) -> None:
        """Take the next step of the save in flight, if all ranks' threads have done the one before. Collective.

        Args:
            num_tasks_done: the smallest of all ranks.

        Raises:
            SaveError: as :meth:`begin`.
        """
        if self._pending is not None and num_tasks_done == self._num_tasks:
            self._go_on(run, self._pending)

    def before_update(self) -> None:
        """The optimizer is about to change what the save in flight may not have written yet. Not collective."""
        if self._snapshot is None:
            return
        with self._progress.meanwhile("save"), self._stalled():
            self._snapshot.secure()

    # ------------------------------------------------------------------------------------------------ at the end

    def finish(self, run: Run) -> None:
        """Wait until no save is in flight. Collective. Raises SaveError as :meth:`begin`."""
        while self._pending is not None:
            self._go_on(run, self._pending)

    def save(self, run: Run, state: TrainState) -> None:
        """Commit the present state, unless this step has a checkpoint already; no save is in flight. Collective.

        Raises:
            SaveError: it could not be written; the older checkpoints stand.
        """
        if state.step == self.saved_step:
            return
        self._begin(run, state)
        assert self._pending is not None
        while not self._advance(run, self._pending):
            pass

    def close(self) -> None:
        """Leave a save that is in flight when a run fails; a whole run has none. Not collective."""
        if self._snapshot is not None and self._pending is not None:
            self._snapshot.abandon()
            self._pending.join(ABANDON_SECONDS)

    # ------------------------------------------------------------------------------------------------ how

    def _begin(self, run: Run, state: TrainState) -> None:
        self._stall_seconds = 0.0
        self._began_at = time.perf_counter() - self._step_log.total_excluded_seconds
        with self._stalled():
            snapshot = Snapshot(run.engine, self._memory)

            def write_payload(staging: Path) -> Sequence[WrittenFile]:
                files = snapshot.write(staging)
                if run.groups.rank == 0:
                    shutil.copytree(self._model_folder, staging / "model")
                    self._step_log.sync()
                return files

            self._pending = begin(
                self.folder,
                state.step,
                groups=run.groups,
                attempt=self._attempt,
                write_payload=write_payload,
                payload_bytes=snapshot.num_bytes,
                state={
                    **self.identity,
                    "attempt": self._attempt,
                    "versions": versions(),
                    "train": state.to_json(),
                    HELD_OUT_KEY: run.evaluation.losses_at(state.step),
                },
                disk=self.disk,
                keep=Keep(self._section.keep_last, self._section.keep_every_steps, self._section.keep_best),
            )
            self._num_tasks += 1
            self._snapshot = snapshot
            self._progress.is_saving = True
            if snapshot.needs_all:
                snapshot.secure()

    def _go_on(self, run: Run, pending: PendingSave) -> None:
        try:
            self._advance(run, pending)
        except SaveError as error:
            self._count_failure(run, pending.step, error)

    def _advance(self, run: Run, pending: PendingSave) -> bool:
        """Returns whether the save is over."""
        try:
            with self._stalled():
                is_committed = pending.advance()
        except SaveError:
            self._forget()
            raise
        if not is_committed:
            self._num_tasks += 1
            return False
        self._forget()
        self.saved_step, self._num_failed_in_row = pending.step, 0
        self._progress.save_seconds = pending.write_seconds
        self._learn_cost(run, pending.step)
        seconds = {"stall_seconds": self._stall_seconds, "write_seconds": pending.write_seconds}
        run.recorder.write("checkpoint", {"step": pending.step, "path": str(pending.path), **seconds})
        return True

    def _forget(self) -> None:
        """No save is in flight any more."""
        self._pending = self._snapshot = None
        self._progress.is_saving = False

    def _learn_cost(self, run: Run, saved_step: int) -> None:
        """The save has cost the time for which training stood, and that by which its steps were slower than others."""
        step_seconds = self._progress.median_step_seconds
        clock = time.perf_counter() - self._step_log.total_excluded_seconds
        usual = (self._progress.step - saved_step) * (step_seconds or 0.0)
        slower = clock - self._began_at - usual
        self._interval.learn(run.groups, self._stall_seconds + max(0.0, slower), step_seconds)

    def _count_failure(self, run: Run, step: int, error: SaveError) -> None:
        self._num_failed_in_row += 1
        standing = "there is no checkpoint yet" if self.saved_step is None else f"step {self.saved_step} stands"
        count = f"{self._num_failed_in_row} of {self._section.max_failed_saves} in a row"
        if self._num_failed_in_row >= self._section.max_failed_saves:
            raise SaveError(f"step {step} could not be saved ({count}); {standing}: {error}") from error
        run.recorder.warn(f"step {step} could not be saved ({count}), training goes on; {standing}: {error}")

    @contextmanager
    def _stalled(self) -> Iterator[None]:
        """Training stands still for this."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._stall_seconds += seconds
            self._step_log.exclude(seconds)


def versions() -> dict[str, Any]:
    """Versions that decide what a checkpoint means."""
    packages = {name: version(name) for name in ("dsft", "torch", "deepspeed", "transformers")}
    return {**packages, "checkpoint": CHECKPOINT_VERSION, "order": ORDER_VERSION}

"""When a run saves, and what it hands to the commit protocol."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.checkpoint.commit import save
from dsft.checkpoint.manifest import WrittenFile
from dsft.checkpoint.payload import estimate_bytes, save_engine
from dsft.config.models import CheckpointSection
from dsft.constants import CHECKPOINT_VERSION, ORDER_VERSION
from dsft.errors import SaveError
from dsft.train.state import TrainState

if TYPE_CHECKING:
    from dsft.train.loop import Run


@dataclass(slots=True)
class Saver:
    """Checkpoints of a run.

    Attributes:
        section: how often, and how many are kept.
        folder: ``<run>/checkpoints``.
        model_folder: ``<run>/model``: config, tokenizer and chat template, copied into each checkpoint so that it
            can be exported without the run.
        attempt: id of this start of the run.
        identity: what a resume compares: resolved configuration, store fingerprints, world size.
        saved_step: step of the last checkpoint of this start, or of the one it went on from.
        num_failed_in_row: saves that failed since the last one that did not.
    """

    section: CheckpointSection
    folder: Path
    model_folder: Path
    attempt: str
    identity: dict[str, Any]
    saved_step: int | None = None
    num_failed_in_row: int = 0

    def due(self, state: TrainState) -> bool:
        """Whether the step that was just taken ends an interval."""
        every = self.section.every_steps
        return every is not None and state.step % every == 0

    def try_save(self, run: Run, state: TrainState) -> None:
        """As :meth:`save`, but training goes on after a failure, until ``checkpoint.max_failed_saves`` in a row.

        Collective; a failed save fails on every rank, so all of them count alike.

        Raises:
            SaveError: so many saves in a row have failed.
        """
        try:
            self.save(run, state)
        except SaveError as error:
            self.num_failed_in_row += 1
            standing = "there is no checkpoint yet" if self.saved_step is None else f"step {self.saved_step} stands"
            count = f"{self.num_failed_in_row} of {self.section.max_failed_saves} in a row"
            if self.num_failed_in_row >= self.section.max_failed_saves:
                raise SaveError(f"step {state.step} could not be saved ({count}); {standing}: {error}") from error
            run.recorder.warn(f"step {state.step} could not be saved ({count}), training goes on; {standing}: {error}")

    def save(self, run: Run, state: TrainState) -> None:
        """Commit the present state as one checkpoint (collective), unless this step has one already.

        Raises:
            SaveError: it could not be written; the older checkpoints stand.
        """
        if state.step == self.saved_step:
            return
        started = time.perf_counter()

        def write_payload(staging: Path) -> Sequence[WrittenFile]:
            files = [*save_engine(run.engine, staging)]
            if run.groups.rank == 0:
                shutil.copytree(self.model_folder, staging / "model")
                run.step_log.sync()
            return files

        checkpoint = save(
            self.folder,
            state.step,
            groups=run.groups,
            attempt=self.attempt,
            write_payload=write_payload,
            payload_bytes=estimate_bytes(run.engine),
            state={**self.identity, "attempt": self.attempt, "versions": versions(), "train": state.to_json()},
            keep_last=self.section.keep_last,
        )
        self.saved_step, self.num_failed_in_row = state.step, 0
        seconds = time.perf_counter() - started
        run.step_log.exclude(seconds)
        run.recorder.write("checkpoint", {"step": state.step, "path": str(checkpoint), "seconds": seconds})


def versions() -> dict[str, Any]:
    """Versions that decide what a checkpoint means."""
    packages = {name: version(name) for name in ("dsft", "torch", "deepspeed", "transformers")}
    return {**packages, "checkpoint": CHECKPOINT_VERSION, "order": ORDER_VERSION}

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
    """

    section: CheckpointSection
    folder: Path
    model_folder: Path
    attempt: str
    identity: dict[str, Any]
    saved_step: int | None = None

    def due(self, state: TrainState) -> bool:
        """Whether the step that was just taken ends an interval."""
        every = self.section.every_steps
        return every is not None and state.step % every == 0

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
        self.saved_step = state.step
        seconds = time.perf_counter() - started
        run.step_log.exclude(seconds)
        run.recorder.write("checkpoint", {"step": state.step, "path": str(checkpoint), "seconds": seconds})


def versions() -> dict[str, Any]:
    """Versions that decide what a checkpoint means."""
    packages = {name: version(name) for name in ("dsft", "torch", "deepspeed", "transformers")}
    return {**packages, "checkpoint": CHECKPOINT_VERSION, "order": ORDER_VERSION}

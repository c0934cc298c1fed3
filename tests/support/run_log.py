"""The logs that a run leaves, made by the real planner, loader and collate, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsft.batch.hashing import HASH_MASK
from dsft.batch.loader import Loader
from dsft.checkpoint.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    Manifest,
    WrittenFile,
    checkpoint_name,
    manifest_to_json,
)
from dsft.config.load import config_to_json
from dsft.config.models import RunConfig
from dsft.fsio import hash_file, write_json
from dsft.metrics.json_lines import JsonLines
from dsft.sampling.objectives import Objective
from dsft.sampling.types import Cursor, Growth
from dsft.store.reader import SourceStore
from dsft.train.attempts import ATTEMPTS_NAME, Attempt, Origin
from dsft.train.growth import Before, growth_at
from dsft.train.setup import Data, build_batch_spec, plan_sources, planned_sources
from dsft.train.step_log import DATA_LOG_NAME


class _NoTokenizer:
    pad_id = 0


@dataclass
class LoggedRun:
    """A run folder that grows attempt by attempt.

    Attributes:
        stores: may be replaced by grown ones between two attempts.
        cursors: step -> the cursor after it, on the line that the last attempt is of.
        before: attempt -> the sources as it had them.
    """

    folder: Path
    stores: Sequence[SourceStore]
    config: dict[str, Any]
    objectives: tuple[Objective | None, ...] = ()

    def __post_init__(self) -> None:
        self.cursors: dict[int, Cursor] = {}
        self.before: dict[str, dict[str, Before]] = {}

    def attempt(
        self,
        name: str,
        num_ranks: int,
        last_step: int | None = None,
        *,
        after: tuple[str, int] | None = None,
        saves: bool = True,
        **train: Any,
    ) -> int:
        """Run steps on ``num_ranks`` ranks and log them; returns the last step.

        Args:
            last_step: None runs to the end of the plan.
            after: (attempt, step) of the checkpoint it goes on from.
            saves: ends with a checkpoint.
            train: keys of the train section that this attempt has otherwise.
        """
        config = {**self.config, "train": {**self.config["train"], **train}}
        parsed = RunConfig.model_validate({**config, "run": {"name": "t", "dir": str(self.folder)}})
        data = Data(_NoTokenizer(), tuple(self.stores), ())  # type: ignore[arg-type]
        step = 0 if after is None else after[1]
        growth: Sequence[Growth] = ((),) * len(self.stores)
        if after is not None:
            growth = growth_at(parsed, data, self.before[after[0]], self.cursors[step])
        self.before[name] = {
            store.name: Before(store.num_shards, grown) for store, grown in zip(self.stores, growth, strict=True)
        }
        sources = planned_sources(parsed, self.stores, self.objectives or (None,) * len(self.stores), growth)
        planner = plan_sources(parsed, sources)
        spec = replace(build_batch_spec(parsed, data), objectives=tuple(source.objective for source in sources))
        loaders = [
            Loader(
                planner_of,
                spec,
                rank=rank,
                num_ranks=num_ranks,
                micro_batch_packs=1,
                costs=lambda packs: [1.0] * len(packs),
            )
            for rank, planner_of in enumerate(plan_sources(parsed, sources) for _ in range(num_ranks))
        ]
        identity = {
            "config": config_to_json(parsed),
            "world_size": num_ranks,
            "growth": dict(zip((store.name for store in self.stores), growth, strict=True)),
        }
        origin = None if after is None else Origin(self.checkpoint(after[1]), after[0])
        begun = Attempt.of(
            name,
            step,
            origin,
            identity,
            self.stores,
            [source.objective and source.objective.objective for source in sources],
        )
        _append(self.folder / ATTEMPTS_NAME, asdict(begun))
        cursor = planner.start() if after is None else self.cursors[step]
        for batches in zip(*(loader.steps(cursor) for loader in loaders), strict=True):
            if step == last_step:
                break
            step += 1
            micro = [one for batch in batches for one in batch.micro_batches]
            line = {
                "step": step,
                "attempt": name,
                "data_hash": sum(one.data_hash for one in micro) & HASH_MASK,
                "tokens": sum(one.num_tokens for one in micro),
            }
            _append(self.folder / DATA_LOG_NAME, line)
            self.cursors[step] = batches[0].plan.cursor_after
        for loader in loaders:
            loader.close()
        if saves:
            self._save(name, step, num_ranks)
        return step

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / "checkpoints" / checkpoint_name(step)

    def _save(self, name: str, step: int, num_ranks: int) -> None:
        folder = self.checkpoint(step)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE_NAME, {"attempt": name, "train": {"step": step}})
        state = WrittenFile(STATE_NAME, *hash_file(folder / STATE_NAME))
        write_json(folder / MANIFEST_NAME, manifest_to_json(Manifest(step, name, num_ranks, ((state,),))))


def _append(path: Path, line: dict[str, Any]) -> None:
    lines = JsonLines(path)
    lines.write(line)
    lines.close()

"""``--dry-run``: what the run would train, counted by the real plan, and the memory of a real forward and backward."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.batch.types import model_inputs
from dsft.checkpoint.payload import check_engine
from dsft.config.models import RunConfig
from dsft.fsio import save_error
from dsft.metrics.recorder import Recorder
from dsft.metrics.throughput import peak_memory_bytes
from dsft.model.flops import ModelCost
from dsft.model.probe import prove
from dsft.train import setup
from dsft.train.schedule import build_schedule

if TYPE_CHECKING:
    from dsft.dist import Groups


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do.

    Attributes:
        num_steps, num_packs: of the whole run.
        num_tokens: document tokens drawn.
        sources: per source: files, documents and tokens in the store, tokens drawn, epochs, and what the overlong
            policy did.
        peak_memory_bytes: highest over ranks, after forward and backward of the first step's first micro-batch: device
            memory on CUDA, resident memory of the process on the CPU.
    """

    num_steps: int
    num_packs: int
    num_tokens: int
    sources: tuple[dict[str, Any], ...]
    peak_memory_bytes: int


def dry_run(config: RunConfig, data: setup.Data, groups: Groups, engine: Any, cost: ModelCost) -> DryRun:
    """Prove the model, run the whole plan and one micro-batch; collective. Nothing is trained or written.

    Raises:
        ModelError: documents are not kept apart, or the head is not what it should be.
        CheckpointError, ConfigError: state that cannot be saved; a schedule that does not fit into the run.
    """
    with groups.together():
        check_engine(engine)
        tokens = setup.train_tokens(
            config, setup.planned_sources(config, data.stores, setup.objectives_in_ids(config, data.tokenizer))
        )
        build_schedule(config.train.schedule, lr=config.train.lr, steps=config.train.steps, tokens=tokens)
    prove(engine.module, engine.device)
    loader = setup.build_loader(
        config, data, setup.build_planner(config, data), cost, rank=groups.rank, num_ranks=groups.size
    )
    planner = setup.build_planner(config, data)
    first = next(loader.steps(planner.start()))
    output = engine(**model_inputs(first.micro_batches[0], engine.device))
    engine.backward(output.loss + output.aux_loss, scale_wrt_gas=False)
    loader.close()
    num_steps = num_packs = num_tokens = 0
    for plan in planner.steps(planner.start()):
        num_steps, num_packs, num_tokens = num_steps + 1, num_packs + len(plan.packs), plan.tokens_trained
        if num_steps == config.train.steps:
            break
    sources = []
    for store, stats in zip(data.stores, planner.stats(), strict=True):
        stored = int(store.manifest.num_tokens.sum())
        sources.append(
            {
                "name": stats.name,
                "files": store.num_shards,
                "documents": int(store.manifest.num_documents.sum()),
                "tokens": stored,
                "tokens_drawn": stats.num_tokens,
                "epochs": (stats.num_tokens + stats.truncated_tokens + stats.dropped_tokens) / max(stored, 1),
                "documents_split": stats.num_split,
                "documents_truncated": stats.num_truncated,
                "documents_dropped": stats.num_dropped,
            }
        )
    peaks = groups.all_gather_object(peak_memory_bytes(engine.device))
    return DryRun(num_steps, num_packs, num_tokens, tuple(sources), max(peaks))


def try_sinks(run_dir: Path, sinks: Sequence[str]) -> None:
    """Open what the run would log to, in a folder that is removed again.

    Raises:
        ConfigError: tensorboard is asked for and not installed.
        SaveError: the run's folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=run_dir) as folder:
            recorder = Recorder(Path(folder), sinks, is_main=True)
            recorder.begin(0)
            recorder.write("step", {"step": 0, "loss": 0.0})
            recorder.close()
            if recorder.error is not None:
                raise recorder.error
    except OSError as error:
        raise save_error(run_dir, error) from error


def describe(result: DryRun) -> str:
    """The result as lines for a person."""
    lines = [
        f"dry run: {result.num_steps:,} steps, {result.num_packs:,} packs, {result.num_tokens:,} document tokens; "
        f"memory after the first forward and backward {result.peak_memory_bytes / 2**30:.2f} GiB a rank"
    ]
    for source in result.sources:
        changed = ", ".join(
            f"{source[key]:,} {key.removeprefix('documents_')}"
            for key in ("documents_split", "documents_truncated", "documents_dropped")
            if source[key]
        )
        lines.append(
            f"  {source['name']}: {source['files']:,} files, {source['documents']:,} documents, {source['tokens']:,} "
            f"tokens; draws {source['tokens_drawn']:,} = {source['epochs']:.3f} epochs"
            f"{'; ' + changed if changed else ''}"
        )
    return "\n".join(lines)

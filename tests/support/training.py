"""Whole runs of the real loop on a tiny model, on ranks of the harness, with the data laid out in more than one way."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dsft.batch.loader import Loader
from dsft.checkpoint.engine_state import EngineState
from dsft.config.deepspeed import build_deepspeed_config
from dsft.config.models import RunConfig
from dsft.dist import Groups, drop_shared_memory_name
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from dsft.launch.owner import take_run_folder
from dsft.launch.progress import Progress
from dsft.launch.stop import StopFlag
from dsft.metrics.recorder import METRICS_NAME
from dsft.model.flops import model_cost
from dsft.sampling.plan import Planner
from dsft.sampling.types import Cursor, StepPlan
from dsft.store.reader import SourceStore
from dsft.train import setup
from dsft.train.loop import Run, train
from dsft.train.start import Options, Phases, Rank, build_run
from dsft.train.state import TrainState
from dsft.train.step_log import DATA_LOG_NAME


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        records: one a step, from ``metrics.jsonl``.
        data: one a step, from the data log.
        unsupervised: this rank's micro-batches without a supervised token, (of packs, of fillers).
        state_digest: hash of this rank's fp32 weights and optimizer state at the end.
    """

    records: list[dict[str, Any]]
    data: list[dict[str, Any]]
    unsupervised: tuple[int, int]
    state_digest: str

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [record["loss"] for record in self.records]

    @property
    def grad_norms(self) -> list[float]:
        """Global gradient norm of each step, before clipping."""
        return [record["grad_norm"] for record in self.records]


class OneDocumentPerPack:
    """A plan whose steps hold the same pieces as ``planner``'s, each in a pack of its own: same N, more packs."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def steps(self, cursor: Cursor) -> Iterator[StepPlan]:
        """The planner's steps, re-laid."""
        for plan in self._planner.steps(cursor):
            pieces = [pack.take(slice(row, row + 1)) for pack in plan.packs for row in range(len(pack.length))]
            yield replace(plan, packs=tuple(pieces))


def run_training(
    groups: Groups, run_dir: Path, config: dict[str, Any], stores: list[Path], relaid: bool, resume: str | None = None
) -> Outcome:
    """Train a configuration (keys as in the YAML) through ``dsft.train.loop.train``; collective.

    Args:
        stores: the sources' token stores, in the configuration's order (nothing is prepared, there is no tokenizer).
        relaid: one document a pack.
        resume: checkpoint to go on from.
    """
    with built_run(groups, run_dir, config, stores, resume=resume) as (run, state, parsed, data):
        if relaid:
            planner: Any = OneDocumentPerPack(setup.build_planner(parsed, data))
            cost = model_cost(run.engine.module.hf.config, parsed.data.is_masked)
            loader = setup.build_loader(parsed, data, planner, cost, rank=groups.rank, num_ranks=groups.size)
            run = replace(run, loader=loader)
        unsupervised = _count_unsupervised(run.loader, state.cursor, parsed.train.steps or 0)
        assert train(run, state) == "finished"
        run.loader.close()
        groups.barrier()
        digest = state_digest(run.engine)
    return Outcome(
        read_lines(run_dir / METRICS_NAME, "step"), read_lines(run_dir / DATA_LOG_NAME), unsupervised, digest
    )


@contextmanager
def built_run(
    groups: Groups,
    run_dir: Path,
    config: dict[str, Any],
    stores: Sequence[Path],
    *,
    held_out: Sequence[Path] = (),
    resume: str | None = None,
    allow_lr_jump: bool = False,
) -> Iterator[tuple[Run, TrainState, RunConfig, setup.Data]]:
    """A run over prepared stores, ready for ``dsft.train.loop.train``; collective. The tokenizer writes ids as numbers.

    Args:
        stores, held_out: token stores of the sources and of the held-out sets, in the configuration's order.
        resume: checkpoint to go on from.
    """
    parsed = RunConfig.model_validate({**config, "run": {"name": "t", "dir": str(run_dir), "seed": 17}})
    tokenizer: Any = SimpleNamespace(
        vocab_tokens=SourceStore(stores[0]).manifest.vocab_tokens if parsed.data.is_masked else 1,
        num_added=0,
        pad_id=0,
        eos_id=2,
        chat_template=None,
        control=SimpleNamespace(ids=frozenset({0, 1, 2})),
        decode=lambda ids: " ".join(map(str, ids)),
        hf=SimpleNamespace(save_pretrained=lambda _: None, mask_token_id=1),
    )
    data = setup.Data(tokenizer, tuple(map(SourceStore, stores)), tuple(map(SourceStore, held_out)))
    deepspeed_config = build_deepspeed_config(parsed, groups.size, "cpu")
    prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=setup.is_offloaded(deepspeed_config)), "cpu")
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)  # as dist.init does
    groups.barrier()
    drop_shared_memory_name(groups.world)
    folder = take_run_folder(run_dir, groups)
    rank = Rank(groups, "cpu", deepspeed_config, folder, StopFlag(), Progress(), Phases())
    options = Options(resume=resume, allow_lr_jump=allow_lr_jump)
    with ExitStack() as cleanup:
        cleanup.callback(folder.release)
        engine, hf_config = setup.build_engine(parsed, data, groups, parsed.model.path, deepspeed_config, "cpu")
        cleanup.callback(engine.destroy)
        cost = model_cost(hf_config, parsed.data.is_masked)
        run, state = build_run(parsed, options, data, rank, engine, hf_config, cost)
        for close in (run.loader.close, run.recorder.close, run.saver.close):  # the last one first
            cleanup.callback(close)
        yield run, state, parsed, data
    groups.barrier()


def state_digest(engine: Any) -> str:
    """Hash of this rank's part: fp32 weights, and every tensor of the optimizer's state. Not of ZeRO's padding."""
    digest = hashlib.sha256()
    state = EngineState(engine)
    layout = state.layout()
    digest.update(f"{layout.step}".encode())
    for one in state.slices_to_write():
        for key in layout.keys_of(one.tensor):
            digest.update(
                f"{one.tensor.name}/{key}".encode() + state.view(one, key).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def _count_unsupervised(loader: Loader, cursor: Cursor, num_steps: int) -> tuple[int, int]:
    of_packs = of_fillers = 0
    for _, batch in zip(range(num_steps), loader.steps(cursor), strict=False):
        for micro_batch in batch.micro_batches:
            if micro_batch.rows.numel() == 0:
                of_fillers += micro_batch.is_filler
                of_packs += not micro_batch.is_filler
    return of_packs, of_fillers


def read_lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The JSON lines of a file, of one kind."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]

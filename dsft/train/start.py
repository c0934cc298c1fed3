"""From a configuration to a finished run: who are we, what data, which model, from where, train."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.config.load import config_to_json
from dsft.config.models import RunConfig
from dsft.constants import EXIT_OK, EXIT_STOPPED_EARLY
from dsft.errors import DsftError
from dsft.fsio import write_json
from dsft.launch.native_ops import prepare_deepspeed_ops
from dsft.world import check_world_size, discover_world

if TYPE_CHECKING:
    from dsft.dist import Groups
    from dsft.launch.owner import RunFolder
    from dsft.train.loop import Run
    from dsft.train.setup import Data
    from dsft.train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to the configuration.

    Attributes:
        resume: ``auto``, a checkpoint folder, or None for a fresh start.
        allow_data_change: resume although the data order changes.
        dry_run: show what would be trained, train nothing.
        profile_steps: steps to trace.
    """

    resume: str | None = None
    allow_data_change: bool = False
    dry_run: bool = False
    profile_steps: range = range(0)


class Phases:
    """Seconds of each phase of the start, for ``start.json`` and the log."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def done(self, name: str) -> None:
        """The phase that just ended was ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def start(config: RunConfig, options: Options, *, local_rank_argument: int | None) -> int:
    """Run ``config`` as the rank that this process is; returns the exit code.

    Raises:
        DsftError: on every rank, or at least on the one that can name the cause.
    """
    phases = Phases()
    world = discover_world(os.environ, local_rank_argument)
    check_world_size(world, config.run.world_size)
    prepare_deepspeed_ops(world)
    phases.done("op_build_seconds")
    from dsft import dist
    from dsft.launch.owner import RunFolder
    from dsft.train.setup import device_type

    groups = dist.init(world, device_type())
    phases.done("imports_seconds")
    with RunFolder(Path(config.run.dir), groups) as folder:
        try:
            return _run(config, options, groups, folder, phases)
        except DsftError:
            folder.set_status("failed")
            raise


def _run(config: RunConfig, options: Options, groups: Groups, folder: RunFolder, phases: Phases) -> int:
    from dsft.train import setup
    from dsft.train.dry_run import dry_run
    from dsft.train.loop import train

    data, weights = _agreed_data(config, groups)
    phases.done("prepare_seconds")
    if options.dry_run:
        dry_run(config, data, groups, weights)
        return EXIT_OK
    engine, hf_config = setup.build_engine(config, data, groups, weights)
    phases.done("model_seconds")
    run, state = build_run(config, options, data, groups, folder, engine, hf_config)
    phases.done("resume_seconds")
    if groups.rank == 0:
        write_json(folder.path / "config.json", config_to_json(config))
        write_json(folder.path / "start.json", phases.seconds)
    folder.set_status("running")
    outcome = train(run, state)
    run.recorder.close()
    run.loader.close()
    folder.set_status("stopped" if outcome == "stopped" else "finished", step=state.step, outcome=outcome)
    groups.close()
    return EXIT_STOPPED_EARLY if outcome == "stopped" else EXIT_OK


def _agreed_data(config: RunConfig, groups: Groups) -> tuple[Data, str | None]:
    """Tokenizer and stores; an error on one rank (a bad record in its shard) ends all of them with its message."""
    from dsft.train import setup

    error: DsftError | None = None
    try:
        weights = setup.model_folder(config)
        tokenizer = setup.open_tokenizer(config, weights)
        data = setup.open_data(config, tokenizer, worker=groups.rank, num_workers=groups.size)
    except DsftError as caught:
        error = caught
    groups.agree(error)
    return data, weights


def build_run(
    config: RunConfig,
    options: Options,
    data: Data,
    groups: Groups,
    folder: RunFolder,
    engine: Any,
    hf_config: Any,
) -> tuple[Run, TrainState]:
    """Assemble the run around a built engine, and its state: fresh, or of the checkpoint to resume from."""
    from dsft.evaluate.overfit import OverfitWatch
    from dsft.evaluate.run import HeldOutSet
    from dsft.launch.stop import StopRequest
    from dsft.metrics.recorder import Recorder
    from dsft.model.flops import model_cost
    from dsft.model.probe import prove
    from dsft.train import setup
    from dsft.train.evaluation import EvaluationPlan
    from dsft.train.loop import Run
    from dsft.train.profiling import Profiler
    from dsft.train.resume import restore
    from dsft.train.saving import Saver
    from dsft.train.schedule import build_schedule
    from dsft.train.step_log import StepLog

    is_main = groups.rank == 0
    names = tuple(source.name for source in config.data.sources)
    planner = setup.build_planner(config, data)
    cost = model_cost(hf_config)
    loader = setup.build_loader(config, data, planner, cost, rank=groups.rank, num_ranks=groups.size)
    identity = {
        "config": config_to_json(config),
        "stores": {name: store.fingerprint for name, store in zip(names, data.stores, strict=True)},
        "world_size": groups.size,
    }
    saver = Saver(config.checkpoint, folder.path / "checkpoints", folder.path / "model", folder.attempt, identity)
    recorder = Recorder(folder.path, config.log.sinks, is_main=is_main, attempt=folder.attempt)
    state = restore(
        options.resume,
        saver,
        engine,
        groups,
        recorder,
        planner.start(),
        allow_data_change=options.allow_data_change,
    )
    prove(engine.module, engine.device)
    if is_main:
        setup.write_model_folder(folder.path / "model", hf_config, data.tokenizer, engine.module)
    section = config.evaluate
    watch = OverfitWatch.from_json(section.early_stop.patience if section.early_stop else 3, state.overfit)
    sets = tuple(
        HeldOutSet(one, store, setup.held_out_spec(config, data.tokenizer, store))
        for one, store in zip(section.sets, data.held_out, strict=True)
    )
    tokens = setup.train_tokens(config, data)
    run = Run(
        engine=engine,
        groups=groups,
        loader=loader,
        schedule=build_schedule(config.train.schedule, lr=config.train.lr, steps=config.train.steps, tokens=tokens),
        saver=saver,
        evaluation=EvaluationPlan(section, sets, data.tokenizer, watch),
        recorder=recorder,
        step_log=StepLog(groups, names, cost, folder.path / "data_log.jsonl" if is_main else None, folder.attempt),
        stop=StopRequest(),
        profiler=Profiler(options.profile_steps, folder.path / "profile", groups.rank),
        seed=config.run.seed,
        salt=_salt(identity),
        num_sources=len(names),
        log_every_steps=config.log.every_steps,
        max_steps=config.train.steps,
        max_skipped_steps=config.train.max_skipped_steps,
    )
    return run, state


def _salt(identity: dict[str, Any]) -> int:
    """Hash of stores and order-relevant configuration: ranks that differ in either disagree at their first step."""
    from dsft.config.load import config_differences

    order = [(d.key, d.new) for d in config_differences({}, identity["config"]) if d.changes_data_order]
    digest = hashlib.blake2b(repr((order, sorted(identity["stores"].items()))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

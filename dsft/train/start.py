"""From a configuration to a finished run: who are we, what data, which model, from where, train."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft import dist
from dsft.checkpoint.local_disk import open_local_disk
from dsft.config.deepspeed import build_deepspeed_config
from dsft.config.load import config_differences, config_to_json
from dsft.config.models import RunConfig
from dsft.constants import EXIT_OK, EXIT_RUN_FAILED, EXIT_STOPPED_EARLY
from dsft.errors import ConfigError, DsftError, SaveError, StoppedEarly
from dsft.evaluate.bias import check_bias
from dsft.evaluate.generation import check_section
from dsft.evaluate.overfit import OverfitWatch
from dsft.evaluate.run import HeldOutSet
from dsft.fsio import write_json
from dsft.launch.ancestors import Launcher
from dsft.launch.memory import explained
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from dsft.launch.owner import RunFolder, RunStatus, read_run_state, take_run_folder
from dsft.launch.progress import Progress
from dsft.launch.rank_log import RankLog
from dsft.launch.stop import StopFlag
from dsft.launch.watch import Watch
from dsft.metrics.console import Console, set_up_logging
from dsft.metrics.recorder import Recorder
from dsft.metrics.throughput import Throughput
from dsft.metrics.trackers import TrackedRun, hyper_parameters
from dsft.model.flops import ModelCost, model_cost
from dsft.model.load import resolved_commit
from dsft.model.probe import prove
from dsft.ops.backend import choose as choose_kernels
from dsft.train import setup
from dsft.train.agreement import check_same_configuration, check_same_stores, with_pinned_start
from dsft.train.attempts import Attempt, append_attempt
from dsft.train.dry_run import describe, dry_run, try_sinks
from dsft.train.evaluation import EvaluationPlan
from dsft.train.followed_advice import keep_advice
from dsft.train.growth import growth_at
from dsft.train.loop import Run, train
from dsft.train.profiling import Profiler
from dsft.train.resume import restore, with_any
from dsft.train.revision import pin_revision, with_revision
from dsft.train.saving import Saver, versions
from dsft.train.schedule import build_schedule
from dsft.train.slow_ranks import SlowRanks
from dsft.train.spikes import SpikeWatch
from dsft.train.state import TrainState
from dsft.train.step_log import StepLog
from dsft.train.store_identity import stores_identity
from dsft.train.streamed_files import begin_streaming
from dsft.world import check_world_size, discover_world

logger = logging.getLogger(__name__)

_LAST_WORDS = {
    "finished": "finished after step %d; everything is saved",
    "early_stop": "ended early after step %d, because of what was evaluated (see the warning); everything is saved",
    "stopped": "stopped on request after step %d; everything is saved: go on with --resume auto",
    "out_of_time": "stopped on request after step %d, too late to save it (see above): go on with --resume auto",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to the configuration.

    Attributes:
        resume: ``auto``, ``if-any``, a checkpoint folder, or None for a fresh start.
        allow_data_change: resume although the data order changes.
        allow_lr_jump: resume although the learning rate had decayed and would be far higher again.
        dry_run: show what would be trained, train nothing.
        profile_steps: steps to trace.
        max_seconds: stop, with everything saved, so that the run ends about so long after its start.
    """

    resume: str | None = None
    allow_data_change: bool = False
    allow_lr_jump: bool = False
    dry_run: bool = False
    profile_steps: range = range(0)
    max_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What must be alike on all ranks."""
        return {name: getattr(self, name) for name in ("resume", "allow_data_change", "allow_lr_jump", "dry_run")}


@dataclass(frozen=True, slots=True)
class Rank:
    """What this process is and holds before there is a model."""

    groups: dist.Groups
    device_type: dist.DeviceType
    deepspeed_config: dict[str, Any]
    folder: RunFolder
    stop: StopFlag
    progress: Progress
    phases: Phases


class Phases:
    """Seconds of each phase of the start, written to ``start.json``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def done(self, name: str) -> None:
        """The phase that just ended was ``name``."""
        now = time.perf_counter()
        self.seconds[name] = now - self._since
        self._since = now


def start(config: RunConfig, options: Options, *, launcher: Launcher, local_rank_argument: int | None) -> int:
    """Run ``config`` as the rank that this process is; returns the exit code.

    Args:
        launcher: what started this process, found before the slow imports.

    Raises:
        DsftError: on every rank, or at least on the one that can name the cause.
    """
    phases = Phases()
    world = discover_world(os.environ, local_rank_argument)
    check_world_size(world, config.run.world_size)
    set_up_logging(is_main=world.rank == 0, who=f"{socket.gethostname()}, rank {world.rank}")
    stop, progress = StopFlag(), Progress()
    with stop, Watch(stop, progress, launcher, rank=world.rank, max_seconds=options.max_seconds) as watch:
        device_type = setup.choose_device_type(os.environ)
        deepspeed_config = build_deepspeed_config(config, world.size, device_type)
        groups = _join(config, options, world, deepspeed_config, device_type, phases)
        folder = take_run_folder(Path(config.run.dir), groups)
        watch.take(folder)
        log = RankLog(folder.path, world.rank, folder.attempt)
        state: TrainState | None = None
        try:
            with groups.together():
                log.open()
            rank = Rank(groups, device_type, deepspeed_config, folder, stop, progress, phases)
            ready = _set_up(config, options, rank)
            if ready is None:
                return EXIT_OK
            run, state = ready
            return _train(run, state, folder)
        except BaseException as caught:
            error = explained(caught)
            log.write_error(error)
            if not options.dry_run:
                _write_failure(folder, None if state is None else state.step, error)
            if error is caught:
                raise
            raise error from caught
        finally:
            watch.leave()
            log.close()
            folder.release()


def _join(
    config: RunConfig,
    options: Options,
    world: dist.World,
    deepspeed_config: dict[str, Any],
    device_type: dist.DeviceType,
    phases: Phases,
) -> dist.Groups:
    """Native operations, process group, and the proof that all ranks were started alike. Collective."""
    cpu_adam, nvme = setup.is_offloaded(deepspeed_config), setup.uses_nvme(deepspeed_config)
    prepare_deepspeed_ops(needed_ops(device_type, cpu_adam=cpu_adam, nvme=nvme), device_type)
    choose_kernels(config.kernels, device_type)
    phases.done("op_build_seconds")
    groups = dist.init(world, device_type)
    phases.done("process_group_seconds")
    started_with = {
        "config": config_to_json(config),
        "deepspeed": deepspeed_config,
        "options": options.to_json(),
        "versions": versions(),
    }
    check_same_configuration(groups, started_with)
    with groups.together():
        check_run_folder(Path(config.run.dir))
    return groups


def _set_up(config: RunConfig, options: Options, rank: Rank) -> tuple[Run, TrainState] | None:
    """Build the run; None after a dry run, which ends here."""
    with rank.groups.together():
        config = pin_revision(config, rank.folder.path / "config.json")
        if rank.folder.is_owner and not options.dry_run:
            keep_advice(config.run.advice, rank.folder.path)
    data, weights = _agreed_data(config, rank)
    rank.phases.done("prepare_seconds")
    engine, hf_config = setup.build_engine(config, data, rank.groups, weights, rank.deepspeed_config, rank.device_type)
    cost = model_cost(hf_config, config.data.is_masked)
    config = with_revision(config, resolved_commit(engine.module))
    rank.phases.done("model_seconds")
    if options.dry_run:
        with rank.groups.together():
            _evaluation(config, data, {})
            if rank.folder.is_owner:
                try_sinks(rank.folder.path, config.log.sinks)
        result = dry_run(config, data, rank.groups, engine, cost)
        logger.info("%s", describe(result))
        rank.groups.close()
        return None
    run, state = build_run(config, options, data, rank, engine, hf_config, cost)
    rank.phases.done("resume_and_probe_seconds")
    with rank.groups.together():
        if rank.folder.is_owner:
            write_json(rank.folder.path / "config.json", config_to_json(config))
            write_json(rank.folder.path / "start.json", rank.phases.seconds)
        rank.folder.write_state("running", state.step)
    return run, state


def _train(run: Run, state: TrainState, folder: RunFolder) -> int:
    outcome = None
    try:
        outcome = train(run, state)
    finally:
        run.saver.close()
        run.recorder.close(failed=outcome is None)
        run.loader.close()
    is_stopped = outcome in ("stopped", "out_of_time")
    exit_code = EXIT_STOPPED_EARLY if is_stopped else EXIT_OK
    with run.groups.together():
        run.profiler.close()
        status: RunStatus = "stopped" if is_stopped else "finished"
        reason = (run.stop.requested or "another rank was asked to stop") if is_stopped else None
        folder.write_state(status, state.step, exit_code=exit_code, outcome=outcome, reason=reason)
    logger.info(_LAST_WORDS[outcome], state.step)
    run.groups.close()
    return exit_code


def check_run_folder(folder: Path) -> None:
    """Raise ConfigError where the run's ``config.json`` would replace one that is no run's (a model's)."""
    saved = folder / "config.json"
    if not saved.is_file():
        return
    try:
        values = json.loads(saved.read_bytes())
    except ValueError:
        values = None
    if not isinstance(values, dict) or not {"run", "model", "data", "train"} <= values.keys():
        raise ConfigError(
            f"run.dir: {folder} is no run folder, because its config.json is not one of dsft's; a run would replace "
            "it. Give the run a folder of its own."
        )


def _write_failure(folder: RunFolder, step: int | None, error: BaseException) -> None:
    """Say in ``run_state.json`` that the run is over; if even that fails, the first error is still the one to raise.

    A start that was refused before it began leaves the run as it was: finished, or stopped with everything saved.
    """
    before = read_run_state(folder.path)
    if step is None and before is not None and before["status"] in ("finished", "stopped"):
        return
    exit_code = error.exit_code if isinstance(error, DsftError) else EXIT_RUN_FAILED
    try:
        status: RunStatus = "stopped" if isinstance(error, StoppedEarly) else "failed"
        folder.write_state(status, step, exit_code=exit_code, error=str(error) or type(error).__name__)
    except SaveError as second:
        logger.error("%s", second)


def _agreed_data(config: RunConfig, rank: Rank) -> tuple[setup.Data, str | None]:
    """Tokenizer and stores; an error on one rank (a bad record in its shard) ends all of them with its message."""
    groups = rank.groups
    pinned = with_pinned_start(config, groups)
    with groups.together():
        streaming = begin_streaming(pinned, groups.world, rank.folder, rank.stop, rank.progress)
        weights = setup.model_folder(pinned)
        tokenizer = setup.open_tokenizer(pinned)
        data = setup.open_data(config, tokenizer, rank.stop, streaming, worker=groups.rank, num_workers=groups.size)
    check_same_stores(groups, (*data.stores, *data.held_out))
    return data, weights


def build_run(
    config: RunConfig, options: Options, data: setup.Data, rank: Rank, engine: Any, hf_config: Any, cost: ModelCost
) -> tuple[Run, TrainState]:
    """Assemble the run around a built engine, and its state: fresh, or of the checkpoint to resume from. Collective."""
    groups, folder = rank.groups, rank.folder
    is_main = groups.rank == 0
    names = tuple(source.name for source in config.data.sources)
    planner = setup.build_planner(config, data)
    stores = dict(zip(names, data.stores, strict=True))
    identity = {"config": config_to_json(config), **stores_identity(stores), "world_size": groups.size}
    objectives = setup.objectives_in_ids(config, data.tokenizer)
    tokens = setup.train_tokens(config, setup.planned_sources(config, data.stores, objectives))
    schedule = build_schedule(config.train.schedule, lr=config.train.lr, steps=config.train.steps, tokens=tokens)
    throughput = Throughput(
        cost.flops_per_token,
        cost.flops_per_token_pair,
        cost.flops_per_row,
        device=engine.device,
        dtype=config.model.dtype,
        num_ranks=groups.size,
    )
    with groups.together():  # rank 0 opens its files
        console = Console(config.train.steps, tokens) if is_main else None
        tracked = TrackedRun(folder.path, config.run.name, config.log.project, hyper_parameters(config))
        recorder = Recorder(folder.path, config.log.sinks, is_main=is_main, console=console, tracked=tracked)
        log_dir = folder.path if is_main else None
        step_log = StepLog(groups, names, throughput, log_dir, folder.attempt, engine.device)
    checkpoints, model_folder = folder.path / "checkpoints", folder.path / "model"
    section = config.checkpoint
    disk = open_local_disk(section.local_dir, checkpoints, folder.attempt, groups)
    saver = Saver(section, checkpoints, disk, model_folder, folder.attempt, identity, step_log, rank.progress)
    resume = with_any(options.resume, saver.folder, groups)
    state, origin = restore(
        resume,
        saver,
        engine,
        groups,
        recorder,
        planner.start(),
        schedule,
        stores,
        allow_data_change=options.allow_data_change,
        allow_lr_jump=options.allow_lr_jump,
    )
    with groups.together():
        growth = growth_at(config, data, {} if origin is None else origin.before, state.cursor)
        planner = setup.build_planner(config, data, growth)
        identity["growth"] = dict(zip(names, growth, strict=True))
    if saver.saved_step is not None and origin is not None:
        folder.set_checkpoint(origin.checkpoint, saver.saved_step)
    with groups.together():
        recorder.begin(state.step)
    prove(engine.module, engine.device)
    with groups.together():
        evaluation = _evaluation(config, data, state.overfit)
        attempt = Attempt.of(folder.attempt, state.step, origin, identity, data.stores, objectives)
        if is_main:
            append_attempt(folder.path, attempt)
            setup.write_model_folder(model_folder, hf_config, data.tokenizer, engine.module)
    run = Run(
        engine=engine,
        groups=groups,
        loader=setup.build_loader(config, data, planner, cost, rank=groups.rank, num_ranks=groups.size),
        schedule=schedule,
        saver=saver,
        evaluation=evaluation,
        recorder=recorder,
        step_log=step_log,
        folder=folder,
        stop=rank.stop,
        progress=rank.progress,
        profiler=Profiler(options.profile_steps, folder.path / "profile", groups.rank),
        attempt=attempt,
        spikes=None if config.train.spikes is None else SpikeWatch(config.train.spikes, state.spikes),
        seed=config.run.seed,
        salt=_salt(identity),
        slow_ranks=SlowRanks(groups, engine.module, engine.device, recorder),
        source_names=names,
        log_every_steps=config.log.every_steps,
        max_steps=config.train.steps,
        max_skipped_steps=config.train.max_skipped_steps,
    )
    return run, state


def _evaluation(config: RunConfig, data: setup.Data, overfit: dict[str, Any]) -> EvaluationPlan:
    section = config.evaluate
    patience = section.early_stop.patience if section.early_stop is not None else 3
    sets = tuple(
        HeldOutSet(one, store, setup.held_out_spec(config, data.tokenizer, store))
        for one, store in zip(section.sets, data.held_out, strict=True)
    )
    for held_out in sets:
        check_section(held_out.section, held_out.store, data.tokenizer)
    for test in section.bias:
        check_bias(test)
    watch = OverfitWatch.from_json(patience, overfit)
    return EvaluationPlan(section, sets, data.tokenizer, watch, config.data.pack_tokens)


def _salt(identity: dict[str, Any]) -> int:
    """Hash of stores and order-relevant configuration: ranks that differ in either disagree at their first step."""
    order = [(d.key, d.new) for d in config_differences({}, identity["config"]) if d.changes_data_order]
    digest = hashlib.blake2b(repr((order, sorted(identity["stores"].items()))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

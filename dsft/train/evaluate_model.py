"""``dsft eval``: the held-out sets of a run, measured on any model, by one process or by all ranks of a launch.

Each set's result is a file that is written when the set is done, and answers are kept as they are made: an evaluation
that is started again goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsft import dist
from dsft.config.bias import BiasSection
from dsft.config.deepspeed import build_deepspeed_config
from dsft.config.load import config_to_json
from dsft.config.models import RunConfig
from dsft.constants import EXIT_OK
from dsft.corpus.progress import ProgressLines
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import ConfigError
from dsft.evaluate.answers import KeptAnswers
from dsft.evaluate.bias import check_bias, measure_bias
from dsft.evaluate.bootstrap import Difference, difference
from dsft.evaluate.generation import check_section
from dsft.evaluate.reference_metrics import require_harness
from dsft.evaluate.run import HeldOutSet, SetResult, evaluate_set
from dsft.fsio import save_error, write_json
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
from dsft.metrics.console import set_up_logging
from dsft.model.load import check_loadable, load_model
from dsft.model.packed import PackedCausalLM
from dsft.model.positions import check_positions
from dsft.model.probe import prove
from dsft.ops.backend import choose as choose_kernels
from dsft.train import setup
from dsft.train.agreement import check_same_configuration, check_same_stores, with_pinned_start
from dsft.train.stores import open_stores
from dsft.world import discover_world

logger = logging.getLogger(__name__)

IDENTITY_NAME = "evaluation.json"
TASKS_FOLDER = "tasks"
_LIKELIHOODS = {"loss": ("nll", "num_tokens"), "token_accuracy": ("num_correct", "num_tokens")}
"""Score -> its two columns of a set's documents."""


def evaluate_model(config: RunConfig, model: str, out: Path, *, local_rank_argument: int | None) -> int:
    """Measure the held-out sets of ``config`` on ``model`` and write ``<out>/<set>.json``; the exit code.

    Args:
        model: a Hugging Face folder, a hub name, a dsft checkpoint, or a run folder (its newest checkpoint).
        out: folder of the results; one that holds results of another evaluation is refused.

    Raises:
        DsftError: on every rank, or at least on the one that can name the cause.
    """
    if not config.evaluate.sets and not config.evaluate.bias and config.evaluate.lm_eval is None:
        raise ConfigError(f"{config.file} has nothing to measure; add evaluate.sets.")
    config = _of_model(config, model)
    world = discover_world(os.environ, local_rank_argument)
    set_up_logging(is_main=world.rank == 0, who=f"{socket.gethostname()}, rank {world.rank}")
    device_type = setup.choose_device_type(os.environ)
    deepspeed_config = _without_optimizer(build_deepspeed_config(config, world.size, device_type))
    nvme = setup.uses_nvme(deepspeed_config)
    prepare_deepspeed_ops(needed_ops(device_type, cpu_adam=False, nvme=nvme), device_type)
    choose_kernels(config.kernels, device_type)
    groups = dist.init(world, device_type)
    check_same_configuration(groups, {"config": config_to_json(config), "out": str(out.absolute())})
    sets, tokenizer, folder = _held_out_sets(config, groups)
    identity = {
        "model": folder,
        "seed": config.run.seed,
        "pack_tokens": config.data.pack_tokens,
        "dtype": config.model.dtype,
        "sets": {one.section.name: [one.section.model_dump(mode="json"), one.store.fingerprint] for one in sets},
        "bias": {test.name: test.model_dump(mode="json") for test in config.evaluate.bias},
    }
    if config.evaluate.lm_eval is not None:
        identity["lm_eval"] = config.evaluate.lm_eval.model_dump(mode="json", exclude={"tasks"})
    with groups.together():
        if world.rank == 0:
            _claim(out, identity)
    waiting = [one for one in sets if not groups.broadcast_object(_result_file(out, one).is_file())]
    for one in (one for one in sets if one not in waiting):
        logger.info("%s: measured before, in %s", one.section.name, _result_file(out, one))
    tests = [test for test in config.evaluate.bias if not groups.broadcast_object(_bias_file(out, test.name).is_file())]
    tasks = config.evaluate.lm_eval.tasks if config.evaluate.lm_eval is not None else ()
    tasks = tuple(task for task in tasks if not groups.broadcast_object(_task_file(out, task).is_file()))
    if waiting or tests or tasks:
        packed, device = _build_model(config, folder, tokenizer, groups, deepspeed_config, device_type)
        for one in waiting:
            kept = KeptAnswers(out / f"{one.section.name}.answers.jsonl")
            result = evaluate_set(one, packed, tokenizer, groups, device=device, seed=config.run.seed, kept=kept)
            with groups.together():
                if world.rank == 0:
                    write_json(_result_file(out, one), _to_json(one, result))
            logger.info("%s", _line(one.section.name, result.record()))
        for test in tests:
            _measure_bias(test, packed, tokenizer, groups, device, config, out)
        for task in tasks:
            _measure_task(task, packed, tokenizer, groups, device, config, out)
    groups.close()
    return EXIT_OK


def compare(first: Path, second: Path, seed: int) -> dict[str, dict[str, Difference]]:
    """Set -> score -> how the model of ``second`` differs from that of ``first``, paired by document and prompt.

    Raises:
        ConfigError: a folder has no results, or the sets are not the same documents.
    """
    identities = [_read(folder / IDENTITY_NAME) for folder in (first, second)]
    if any(identities[0].get(key) != identities[1].get(key) for key in ("sets", "bias", "lm_eval", "pack_tokens")):
        raise ConfigError(
            f"{first} and {second} did not measure the same documents (sets, their settings, or pack_tokens differ): "
            "measure both models with the same configuration."
        )
    found: dict[str, dict[str, Difference]] = {}
    for name in identities[0]["sets"]:
        a, b = (_read(folder / f"{name}.json") for folder in (first, second))
        scores = {
            score: difference(
                *((one["documents"][over], one["documents"][under]) for one in (a, b)), seed=seed, purpose=name
            )
            for score, (over, under) in _LIKELIHOODS.items()
        }
        for score in a["each"]:
            columns = ((one["each"][score], None) for one in (a, b))
            scores[score] = difference(*columns, seed=seed, purpose=f"{name}/answers")
        found[name] = scores
    for name in identities[0].get("bias", {}):
        before, after = (_read(_bias_file(folder, name))["each"] for folder in (first, second))
        change = difference((before, None), (after, None), seed=seed, purpose=f"{name}/bias")
        found[f"bias {name}"] = {"value": change}
    for path in sorted((first / TASKS_FOLDER).glob("*.json")):
        if (second / TASKS_FOLDER / path.name).is_file():
            found |= _compare_tasks(_read(path), _read(second / TASKS_FOLDER / path.name), seed)
    return found


def _compare_tasks(first: dict[str, Any], second: dict[str, Any], seed: int) -> dict[str, dict[str, Difference]]:
    return {
        f"task {task}": {
            metric: difference((values, None), (second[task]["each"][metric], None), seed=seed, purpose=f"task/{task}")
            for metric, values in first[task]["each"].items()
        }
        for task in first
    }


def _measure_bias(
    test: BiasSection,
    model: PackedCausalLM,
    tokenizer: Tokenizer,
    groups: dist.Groups,
    device: torch.device,
    config: RunConfig,
    out: Path,
) -> None:
    """Measure one bias test and write its result. Collective."""
    found = measure_bias(
        model, test, tokenizer, groups, device=device, pack_tokens=config.data.pack_tokens, seed=config.run.seed
    )
    with groups.together():
        if groups.rank == 0:
            _bias_file(out, test.name).parent.mkdir(exist_ok=True)
            write_json(_bias_file(out, test.name), asdict(found))
    low, high = found.value_interval
    logger.info("bias %s (%s): %.4f [%.4f, %.4f]", test.name, test.kind, found.value, low, high)


def _measure_task(
    task: str,
    model: PackedCausalLM,
    tokenizer: Tokenizer,
    groups: dist.Groups,
    device: torch.device,
    config: RunConfig,
    out: Path,
) -> None:
    """Measure a task of lm-evaluation-harness (or a group of them) and write its result. Collective."""
    from dsft.evaluate.harness import measure_task

    assert config.evaluate.lm_eval is not None
    results = measure_task(
        task,
        config.evaluate.lm_eval,
        model,
        tokenizer,
        groups,
        device=device,
        pack_tokens=config.data.pack_tokens,
        seed=config.run.seed,
    )
    with groups.together():
        if groups.rank == 0:
            _task_file(out, task).parent.mkdir(exist_ok=True)
            write_json(_task_file(out, task), {name: result.record() for name, result in results.items()})
    for name, result in results.items():
        said = [f"{metric} {value:.4f}" for metric, value in result.scores.items()]
        logger.info("task %s (%d documents): %s", name, result.num_documents, " | ".join(said))


def _of_model(config: RunConfig, model: str) -> RunConfig:
    """The run with another model, and nothing of what only a training from scratch needs."""
    update = {"path": model, "config": None, "revision": None}
    other = config.model_copy(update={"model": config.model.model_copy(update=update)})
    other.set_file(config.file)
    return other


def _without_optimizer(deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """The configuration for an engine that only runs forwards."""
    values = copy.deepcopy(deepspeed_config)
    values["zero_optimization"].pop("offload_optimizer", None)
    return values


def _held_out_sets(config: RunConfig, groups: dist.Groups) -> tuple[list[HeldOutSet], Tokenizer, str]:
    """The sets, prepared by all ranks together, the tokenizer, and the folder of the weights."""
    config = with_pinned_start(config, groups)
    with groups.together():
        folder = setup.model_folder(config)
        assert folder is not None
        tokenizer = setup.open_tokenizer(config)
        report = ProgressLines(logger.info)
        sets = config.evaluate.sets
        stores = open_stores(config, sets, tokenizer, report, worker=groups.rank, num_workers=groups.size)
        for section, store in zip(sets, stores, strict=True):
            check_section(section, store, tokenizer)
        for test in config.evaluate.bias:
            check_bias(test)
        if config.evaluate.lm_eval is not None:
            require_harness()
            from dsft.evaluate.harness import check_tasks

            check_tasks(config.evaluate.lm_eval)
    check_same_stores(groups, stores)
    held_out = [
        HeldOutSet(section, store, setup.held_out_spec(config, tokenizer, store))
        for section, store in zip(sets, stores, strict=True)
    ]
    return held_out, tokenizer, folder


def _build_model(
    config: RunConfig,
    folder: str,
    tokenizer: Tokenizer,
    groups: dist.Groups,
    deepspeed_config: dict[str, Any],
    device_type: dist.DeviceType,
) -> tuple[PackedCausalLM, torch.device]:
    """The model: in slices over the ranks under ZeRO-3, else whole on each. Collective."""
    section = config.model.model_copy(update={"path": folder})
    with groups.together():
        check_loadable(section, tokenizer.vocab_tokens, config.data.is_masked)
    model = load_model(
        section,
        vocab_tokens=tokenizer.vocab_tokens,
        added_tokens=tokenizer.num_added,
        seed=config.run.seed,
        device_type=device_type,
        deepspeed_config=deepspeed_config,
        is_masked=config.data.is_masked,
    )
    check_positions(model.hf, config.data.pack_tokens)
    device = torch.device(device_type, groups.world.local_rank) if device_type == "cuda" else torch.device("cpu")
    if deepspeed_config["zero_optimization"]["stage"] == 3:
        import deepspeed

        with dist.without_prints():
            model = deepspeed.initialize(model=model, config=deepspeed_config)[0].module
    else:
        model.to(device)
    prove(model, device)
    return model, device


def _claim(out: Path, identity: dict[str, Any]) -> None:
    path = out / IDENTITY_NAME
    if path.is_file() and _read(path) != identity:
        raise ConfigError(
            f"{out} holds results of another evaluation (model, sets or settings differ; see {IDENTITY_NAME}); give "
            "another --out, or remove the folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise save_error(out, error) from error
    write_json(path, identity)


def _bias_file(out: Path, name: str) -> Path:
    return out / "bias" / f"{name}.json"


def _task_file(out: Path, task: str) -> Path:
    return out / TASKS_FOLDER / f"{task}.json"


def _result_file(out: Path, one: HeldOutSet) -> Path:
    return out / f"{one.section.name}.json"


def _to_json(one: HeldOutSet, result: SetResult) -> dict[str, Any]:
    documents = {name: column.tolist() for name, column in asdict(result.documents).items()}
    each = dict(result.each)
    if result.outcomes:
        each["pass_rate"] = [float(outcome == "passed") for outcome in result.outcomes]
    answers = None if result.answers is None else asdict(result.answers)
    return {"set": one.section.name, **result.record(), "documents": documents, "each": each, "answers": answers}


def _line(name: str, record: dict[str, Any]) -> str:
    """One set's scores for a person."""
    said = [f"{name}: perplexity {record['perplexity']:.4g}"]
    for score in ("loss", "bits_per_byte", "token_accuracy"):
        low, high = record[f"{score}_interval"]
        said.append(f"{score.replace('_', ' ')} {record[score]:.4f} [{low:.4f}, {high:.4f}]")
    scores = {key: record[key] for key in ("exact_match", "f1") if key in record} | record.get("scores", {})
    for score, value in scores.items():
        low, high = record["intervals"][score]
        said.append(f"{score.replace('_', ' ')} {value:.4f} [{low:.4f}, {high:.4f}]")
    return " | ".join(said)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. Is it from a finished dsft eval?") from error


def differences_as_lines(found: dict[str, dict[str, Difference]]) -> Sequence[str]:
    """The comparison for a person."""
    return [
        f"{name}: {score.replace('_', ' ')} {one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}]"
        + ("" if one.is_significant else " (no difference shown)")
        for name, scores in found.items()
        for score, one in scores.items()
    ]

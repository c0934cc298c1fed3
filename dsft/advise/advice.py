"""``dsft advise``: measure, decide, price the alternatives, and write the run that follows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dsft.advise.estimate import Assumptions, Choice, estimate
from dsft.advise.evidence import Evidence, Method, Situation
from dsft.advise.factors import Factor, factors
from dsft.advise.machines import Machines
from dsft.advise.measure import (
    Inputs,
    Measured,
    general_evidence,
    measure_data,
    pairs_evidence,
    text_evidence,
)
from dsft.advise.recipe import Facts, run_config
from dsft.advise.rules import Verdict, decide
from dsft.config.load import load_config
from dsft.fsio import write_bytes, write_json
from dsft.train.evaluate_model import evaluate_model
from dsft.train.followed_advice import ADVICE_NAME

logger = logging.getLogger(__name__)

DEFAULT_DEEPSPEED: dict[str, Any] = {"zero_optimization": {"stage": 3}}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one method on the stated machines.

    Attributes:
        tokens: of the run. fits: None where a host's memory decides and was not stated. hours: None where the device's
            speed is not known. choice: the fastest way that fits; None: none of those tried fits.
    """

    tokens: int
    fits: bool | None
    device_hours: float | None
    choice: Choice | None


@dataclass(frozen=True, slots=True)
class Advice:
    """The answer.

    Attributes:
        run_file: the YAML; None where nothing is to be trained.
    """

    verdict: Verdict
    factors: tuple[Factor, ...]
    evidence: Evidence
    costs: dict[Method, Cost]
    run_file: Path | None


def advise(
    inputs: Inputs,
    situation: Situation,
    machines: Machines | None,
    assumptions: Assumptions,
    deepspeed_files: Sequence[Path],
) -> Advice:
    """Measure everything and write ``advice.json`` and ``run.yaml`` to ``inputs.folder``.

    The model is measured by ``dsft eval`` on the documents set aside; its results stay in ``folder/base``.

    Raises:
        DsftError: data or model that cannot be used.
    """
    inputs.folder.mkdir(parents=True, exist_ok=True)
    ranks = 1 if machines is None else machines.num_ranks
    measured = measure_data(inputs, sensitivity=situation.sensitivity, deepspeed=DEFAULT_DEEPSPEED, num_ranks=ranks)
    facts = measured.facts
    results = inputs.folder / "base"
    _measure_model(facts, results)
    evidence = Evidence(
        num_parameters=facts.num_parameters,
        text=text_evidence(measured, results),
        pairs=pairs_evidence(measured, results),
        general=general_evidence(measured, results),
        situation=situation,
        device_hours={},
    )
    facts = replace(facts, surprise=evidence.surprise)
    costs = (
        {method: _cost(method, facts, machines, assumptions, deepspeed_files) for method in _possible(measured)}
        if machines is not None
        else {}
    )
    hours = {method: cost.device_hours for method, cost in costs.items() if cost.device_hours is not None}
    evidence = replace(evidence, device_hours=hours)
    verdict = decide(evidence)
    run_file = None
    if verdict.method != "none":
        run_file = inputs.folder / "run.yaml"
        _write_run(run_file, verdict, _with_choice(facts, costs.get(verdict.method)), evidence, costs)
    advice = Advice(verdict, factors(evidence), evidence, costs, run_file)
    write_json(inputs.folder / ADVICE_NAME, to_json(advice))
    return advice


def to_json(advice: Advice) -> dict[str, Any]:
    """The advice as plain values."""
    return {
        "method": advice.verdict.method,
        "verdict": asdict(advice.verdict),
        "factors": [asdict(factor) for factor in advice.factors],
        "evidence": {**asdict(advice.evidence), "surprise": advice.evidence.surprise},
        "costs": {
            method: {"tokens": cost.tokens, "fits": cost.fits, "device_hours": cost.device_hours}
            for method, cost in advice.costs.items()
        },
        "run_file": None if advice.run_file is None else str(advice.run_file),
    }


def _possible(measured: Measured) -> list[Method]:
    """Methods for which there is any data."""
    methods: list[Method] = []
    if measured.facts.pairs is not None:
        methods.append("supervised")
    if measured.facts.text is not None:
        methods.append("unsupervised")
    return [*methods, "both"] if len(methods) == 2 else methods


def _measure_model(facts: Facts, results: Path) -> None:
    """``dsft eval`` of the model as it is on all documents set aside, in this process."""
    method: Method = "both" if facts.text and facts.pairs else "supervised" if facts.pairs else "unsupervised"
    content = run_config(method, replace(facts, sensitivity="low", deepspeed={"zero_optimization": {"stage": 1}}))
    file = facts.folder / "base.yaml"
    write_bytes(file, _yaml(content))
    evaluate_model(load_config(file), facts.model, results, local_rank_argument=None)


def _cost(
    method: Method, facts: Facts, machines: Machines | None, assumptions: Assumptions, files: Sequence[Path]
) -> Cost:
    assert machines is not None
    file = facts.folder / f"estimate-{method}.yaml"
    write_bytes(file, _yaml(run_config(method, facts)))
    config = load_config(file)
    result = estimate(config, machines, assumptions, files)
    file.unlink()
    tokens = config.train.tokens
    assert tokens is not None
    chosen = result.written if result.fastest is None else result.fastest
    hours = None if chosen.hours is None else chosen.hours * machines.num_ranks
    return Cost(tokens, chosen.fits, hours, result.fastest)


def _with_choice(facts: Facts, cost: Cost | None) -> Facts:
    if cost is None or cost.choice is None:
        return facts
    return replace(facts, deepspeed=cost.choice.deepspeed)


def _write_run(path: Path, verdict: Verdict, facts: Facts, evidence: Evidence, costs: dict[Method, Cost]) -> None:
    """The YAML, checked as a run would check it."""
    budget, cost = evidence.situation.max_device_hours, costs.get(verdict.method)
    hours = None if cost is None else cost.device_hours
    scale = 1.0 if budget is None or hours is None or hours <= budget else budget / hours
    content = run_config(verdict.method, facts, scale)
    content["run"]["advice"] = str(path.with_name(ADVICE_NAME))
    if cost is not None and cost.choice is not None:
        content["model"]["activation_checkpointing"] = cost.choice.checkpointing
        content["train"]["micro_batch_packs"] = cost.choice.micro_batch_packs
    lines = [
        "Written by `dsft advise`; change what you like.",
        f"Goal: {evidence.situation.goal}" if evidence.situation.goal else "",
        f"Method: {verdict.method} ({verdict.rule}): {verdict.because}.",
        f"Would change with: {verdict.otherwise}.",
        "" if scale == 1.0 else f"Tokens were cut to {scale:.0%} to stay within {budget:g} device-hours.",
        "Why each number: dsft/advise/recipe.py and docs/advise.md.",
    ]
    header = "".join(f"# {line}\n" for text in lines for line in text.splitlines() if line)
    write_bytes(path, header.encode() + _yaml(content))
    load_config(path)


def _yaml(content: dict[str, Any]) -> bytes:
    dumped: bytes = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110, encoding="utf-8")
    return dumped

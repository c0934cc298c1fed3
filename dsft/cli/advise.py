"""``dsft advise``: supervised, unsupervised or both, from the user's data, model and machines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsft.advise.advice import Advice
    from dsft.advise.machines import Machines

_QUESTIONS = {
    "task": ("narrow", "broad"),
    "control": ("high", "low"),
    "sensitivity": ("low", "medium", "high"),
}
_ASKED = {
    "task": "Will it be asked one kind of question (narrow) or many (broad)?",
    "control": "Must answers keep a form or stay within limits (high), or not (low)?",
    "sensitivity": "May the model give out what stands in the raw text: yes (low), better not (medium), never (high)?",
}


@click.command("advise")
@click.option("--model", required=True, help="Hugging Face folder or hub name of the model to start from.")
@click.option("--text", multiple=True, metavar="PATH", help="Raw text of the domain: file, folder or glob; repeatable.")
@click.option("--pairs", multiple=True, metavar="PATH", help="Prompts with answers (messages, alpaca, sharegpt, ...).")
@click.option("--general", multiple=True, metavar="PATH", help="Text like the model's own: comparison and replay.")
@click.option("--text-field", default="text", show_default=True, help="Field of raw text in its records.")
@click.option("--goal", default="", help="What it is for, in your words; written beside the result.")
@click.option("--task", type=click.Choice(_QUESTIONS["task"]), help=_ASKED["task"])
@click.option("--control", type=click.Choice(_QUESTIONS["control"]), help=_ASKED["control"])
@click.option("--sensitivity", type=click.Choice(_QUESTIONS["sensitivity"]), help=_ASKED["sensitivity"])
@click.option("--hosts", metavar="HOSTSxDEVICESxDEVICE", help="Machines, such as 4x8xH100-80GB, to price each method.")
@click.option("--max-device-hours", type=click.FloatRange(min=0, min_open=True), help="Budget; needs --hosts.")
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), help="Reached operations a second and device.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of run.yaml, of the data split in two, and of all that was measured.",
)
def command(**options: Any) -> None:
    """Measure data and model, recommend supervised, unsupervised or both, and write the run.

    The data is copied to OUT without exact copies, a part of it set aside. The rules are in dsft/advise/rules.py.
    """
    answers: dict[str, Any] = {name: options[name] or _ask(name) for name in _QUESTIONS}
    if options["max_device_hours"] and not options["hosts"]:
        raise click.UsageError("--max-device-hours is compared with an estimate, which needs --hosts")
    import os

    from dsft.advise.advice import advise
    from dsft.advise.estimate import Assumptions
    from dsft.advise.evidence import Situation
    from dsft.advise.machines import parse_hosts
    from dsft.advise.measure import Inputs
    from dsft.train.setup import choose_device_type

    machines = parse_hosts(options["hosts"]) if options["hosts"] else None
    inputs = Inputs(
        model=options["model"],
        text=options["text"],
        pairs=options["pairs"],
        general=options["general"],
        text_field=options["text_field"],
        folder=options["out"],
        device_type=choose_device_type(os.environ) if machines is None else machines.device_type,
    )
    situation = Situation(goal=options["goal"], max_device_hours=options["max_device_hours"], **answers)
    assumptions = Assumptions(tflops=options["tflops"])
    found = advise(inputs, situation, machines, assumptions, sorted(Path("ds_configs").glob("*.json")))
    _print(found, machines)


def _ask(name: str) -> str:
    """The answer of whoever sits at the terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError(f"--{name} cannot be measured, and there is no terminal to ask at: {_ASKED[name]}")
    answer: str = click.prompt(_ASKED[name], type=click.Choice(_QUESTIONS[name]))
    return answer


def _print(found: Advice, machines: Machines | None) -> None:
    verdict = found.verdict
    for factor in found.factors:
        click.echo(f"{factor.name}: speaks for {factor.speaks_for}")
        click.echo(f"  {factor.numbers}")
        click.echo(f"  risk: {factor.risk}")
    if found.costs and machines is not None:
        click.echo(f"cost on {machines.num_hosts} x {machines.devices_per_host} {machines.device_name}:")
        for method, cost in found.costs.items():
            hours = "?" if cost.device_hours is None else f"{cost.device_hours:.3g}"
            fits = {True: "fits", False: "does not fit", None: "fits if the host does"}[cost.fits]
            click.echo(f"  {method:<13} {cost.tokens:>15,} tokens {hours:>9} device-hours  {fits}")
    click.echo(f"\nrecommended: {verdict.method} (rule: {verdict.rule})")
    click.echo(f"  because {verdict.because}")
    click.echo(f"  source: {verdict.source}")
    click.echo(f"  would change with: {verdict.otherwise}")
    click.echo(f"  rules that did not apply: {', '.join(verdict.passed_over) or 'none'}")
    if found.run_file is not None:
        click.echo(f"\nthe run: {found.run_file}\n  dsft config check {found.run_file}\n  dsft train {found.run_file}")

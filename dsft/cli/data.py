"""``dsft data stats``, ``preview``, ``verify-run``, ``audit``, ``bridge``: what training will see, and what it saw."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsft.cli.bridge import command as bridge
from dsft.constants import EXIT_OK, EXIT_RUN_FAILED

if TYPE_CHECKING:
    from dsft.config.evaluation import EvaluationSetSection
    from dsft.config.models import RunConfig, SourceSection
    from dsft.corpus.preview import Preview
    from dsft.corpus.statistics import SourceStatistics
    from dsft.store.reader import SourceStore

PROGRESS_SECONDS = 2.0

_FILE = click.argument("file", metavar="RUN.yaml", type=click.Path(path_type=Path))
_SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: --set data.pack_tokens=4096."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """A run's data: statistics, previews, pairs out of text, and proof of what was trained."""


command.add_command(bridge)


@command.command()
@_FILE
@_SET
@_JSON
def stats(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Count documents and tokens of every source (and prepare what is not prepared)."""
    from dsft.cli.prepare import progress_display
    from dsft.config.load import load_config
    from dsft.corpus.statistics import source_statistics
    from dsft.train.setup import open_tokenizer
    from dsft.train.stores import open_stores

    config = load_config(file, overrides)
    sections: list[SourceSection | EvaluationSetSection] = [*config.data.sources, *config.evaluate.sets]
    with progress_display() as progress:
        stores = open_stores(config, sections, open_tokenizer(config), progress, worker=0, num_workers=1)
    epochs = planned_epochs(config, stores[: len(config.data.sources)])
    rows = [source_statistics(store) for store in stores]
    if as_json:
        values = [{**asdict(row), "epochs": epochs.get(row.name)} for row in rows]
        click.echo(json.dumps({"sources": values}, indent=2))
    else:
        _print_table(rows, epochs)


@command.command()
@_FILE
@_SET
@_JSON
@click.option("--source", "name", help="Only this source or held-out set. [default: all sources]")
@click.option("-n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="Records of each source.")
def preview(file: Path, overrides: tuple[str, ...], as_json: bool, name: str | None, count: int) -> None:
    """Show the first records of each source as tokens, with what is learned standing out.

    On a terminal learned text is green and the rest is grey; elsewhere learned text is in double brackets. Nothing is
    written.
    """
    from dsft.config.load import load_config
    from dsft.corpus.preview import preview_source
    from dsft.errors import ConfigError
    from dsft.train.setup import open_tokenizer

    config = load_config(file, overrides)
    sections: list[SourceSection | EvaluationSetSection] = list(config.data.sources)
    if name is not None:
        known = [*sections, *config.evaluate.sets]
        sections = [section for section in known if section.name == name]
        if not sections:
            names = ", ".join(section.name for section in known)
            raise ConfigError(f"--source {name}: {file} has no source of that name; it has {names}.")
    tokenizer = open_tokenizer(config)
    previews = {section.name: list(preview_source(section, tokenizer, count)) for section in sections}
    if as_json:
        value = [{"name": key, "records": [asdict(item) for item in items]} for key, items in previews.items()]
        click.echo(json.dumps({"sources": value}, indent=2, ensure_ascii=False))
        return
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for key, items in previews.items():
        for item in items:
            _print_preview(key, item, coloured)


@command.command("verify-run")
@click.argument("run", metavar="RUN_FOLDER", type=click.Path(path_type=Path, file_okay=False))
@_JSON
def verify_run(run: Path, as_json: bool) -> int:
    """Prove that each step of a run was given exactly what its plan says, across resumes.

    Recomputes the plan, reads the token stores and compares with the run's data log, along the steps that led to its
    newest checkpoint. Exit code 1 and the steps that differ where it does not hold.
    """
    from dsft.cli.verify_run import print_report
    from dsft.train.verify_run import verify_run as verify

    report = verify(run, _progress_line())
    if as_json:
        click.echo(json.dumps({**asdict(report), "is_proved": report.is_proved}, indent=2))
    else:
        print_report(report)
    return EXIT_OK if report.is_proved else EXIT_RUN_FAILED


@command.command()
@_FILE
@_SET
@_JSON
@click.option("--source", "name", help="Only this source. [default: all sources]")
def audit(file: Path, overrides: tuple[str, ...], as_json: bool, name: str | None) -> int:
    """Read whole sources and count what is wrong with them, before training. Nothing is written.

    Exit code 1 where a limit of data.audit is passed.
    """
    from dsft.cli.audit import audit_run, print_audits
    from dsft.config.load import load_config
    from dsft.corpus.audit import passed_limits

    config = load_config(file, overrides)
    found = audit_run(config, name)
    passed = [line for one in found for line in passed_limits(one, config.data.audit)]
    if as_json:
        sources = [{**asdict(one), "supervised_share": one.supervised_share} for one in found]
        click.echo(json.dumps({"sources": sources, "passed_limits": passed}, indent=2, ensure_ascii=False))
    else:
        print_audits(found)
    for line in passed:
        click.echo(line, err=True)
    return EXIT_RUN_FAILED if passed else EXIT_OK


def _progress_line() -> Callable[[int, int], None]:
    """A line on stderr every few seconds of a long check."""
    said = time.monotonic()

    def progress(step: int, last_step: int) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            click.echo(f"step {step:,} of {last_step:,}", err=True)

    return progress


def planned_epochs(config: RunConfig, stores: list[SourceStore]) -> dict[str, float]:
    """How many times the run's tokens pass over each training source, under the overlong policy.

    Source: tokens drawn from a source (budget times its share, stage by stage) over the tokens of one pass. A run given
    in steps draws at most ``steps * global_batch_packs * pack_tokens`` tokens, and that is taken.
    """
    from dsft.sampling.packing import planned_lengths

    train, data = config.train, config.data
    if train.epochs is not None:
        return {stores[0].name: train.epochs}
    budget = train.tokens if train.steps is None else train.steps * train.global_batch_packs * data.pack_tokens
    assert budget is not None, "the configuration has exactly one of tokens, steps, epochs"
    stages = [(stage.until_tokens, stage.weights) for stage in data.stages] or [(budget, {})]
    stages[-1] = (budget, stages[-1][1])  # the last stage runs to the end of training
    drawn = {source.name: 0.0 for source in data.sources}
    begin = 0
    for until, given in stages:
        weights = given or {source.name: source.weight for source in data.sources}
        tokens = max(0, min(until, budget) - begin)
        begin += tokens
        for source, weight in weights.items():
            drawn[source] += tokens * weight / sum(weights.values())
    epochs: dict[str, float] = {}
    for store in stores:
        lengths = (store.index(shard).lengths for shard in range(store.num_shards))
        columns = (planned_lengths(column, data.pack_tokens, data.overlong) for column in lengths)
        usable = sum(int(column.sum(dtype="int64")) for column in columns)
        epochs[store.name] = drawn[store.name] / usable if usable else 0.0
    return epochs


def _print_table(rows: list[SourceStatistics], epochs: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("source", box=None, pad_edge=False)
    percentiles = list(rows[0].length_percentiles)
    for title in ("shards", "documents", "tokens", "learned", "bytes/token", "epochs"):
        table.add_column(title, justify="right")
    for percentile in percentiles:
        table.add_column(f"p{percentile}", justify="right")
    table.add_column("longest", justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.shards:,}",
            f"{row.documents:,}",
            f"{row.tokens:,}",
            f"{row.supervised_share:.1%}",
            f"{row.bytes_per_token:.2f}" if row.bytes_per_token else "-",
            f"{epochs[row.name]:.2f}" if row.name in epochs else "held out",
            *(f"{row.length_percentiles[percentile]:,}" for percentile in percentiles),
            f"{row.longest:,}",
        )
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print("p5 to longest: tokens a document", style="dim")
    for row in rows:
        for reason, count in row.left_out.items():
            console.print(f"{row.name}: {count:,} records left out: {reason.replace('_', ' ')}")


def _print_preview(source: str, item: Preview, coloured: bool) -> None:
    learned = sum(segment.tokens for segment in item.segments if segment.weight)
    title = f"{source} · {item.location} · {len(item.ids)} tokens, {learned} learned"
    if item.left_out:
        title += f" · left out: {item.left_out}"
    click.echo(click.style(f"── {title} ──", bold=True) if coloured else f"---- {title} ----")
    parts = []
    for segment in item.segments:
        if coloured:
            colour = "green" if segment.weight else "bright_black"
            parts.append(click.style(segment.text, fg=colour, underline=segment.weight not in (0.0, 1.0)))
        else:
            parts.append(f"[[{segment.text}]]" if segment.weight else segment.text)
    click.echo("".join(parts))

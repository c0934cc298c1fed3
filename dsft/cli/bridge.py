"""``dsft data bridge``: instruction pairs out of a run's raw text, by rules."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsft.config.models import RunConfig, SourceSection
    from dsft.corpus.bridge import BridgeCounts

_PROGRESS_SECONDS = 2.0
_RULES = ("cloze", "section", "question")  # as dsft.corpus.bridge_rules.RULES, which imports more than --help needs


@click.command("bridge")
@click.argument("file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="JSON Lines file to write.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: --set data.bad_records=skip."
)
@click.option("--source", "names", multiple=True, help="Only this source; may be repeated. [default: all raw text]")
@click.option("--rule", "rules", multiple=True, type=click.Choice(_RULES), help="Only this rule; may be repeated.")
@click.option(
    "--per-document",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Most pairs of each rule from one document.",
)
@click.option(
    "--min-words",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Least words of a sentence that is filled in, and of a section that is an answer.",
)
@click.option(
    "--max-answer-characters",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="An answer ends with the last whole paragraph up to here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(
    file: Path,
    out: Path,
    overrides: tuple[str, ...],
    names: tuple[str, ...],
    rules: tuple[str, ...],
    per_document: int,
    min_words: int,
    max_answer_characters: int,
    as_json: bool,
) -> None:
    """Make instruction pairs out of raw text by rules, for when pairs are few.

    Sentences with a word left out, headings that ask for their section, headings that are questions: every answer is
    the text's own words. What evaluate.sets hold out gives no pair. The same configuration (run.seed) gives the same
    bytes.
    """
    from dsft.config.load import load_config
    from dsft.corpus.bridge import read_held_out, write_bridge
    from dsft.corpus.bridge_rules import RULES, BridgeSettings

    config = load_config(file, overrides)
    settings = BridgeSettings(
        rules=tuple(rule for rule in RULES if not rules or rule in rules),
        per_document=per_document,
        min_words=min_words,
        max_answer_characters=max_answer_characters,
        seed=config.run.seed,
    )
    said = time.monotonic()

    def progress(documents: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _PROGRESS_SECONDS:
            said = time.monotonic()
            click.echo(f"{documents:,} documents", err=True)

    sections = _text_sources(config, names)
    held_out = read_held_out(config.evaluate.sets, config.data.audit.ngram_words)
    found = write_bridge(sections, out, settings, held_out, bad_records=config.data.bad_records, progress=progress)
    if as_json:
        click.echo(json.dumps({**asdict(found), "num_pairs": found.num_pairs, "out": str(out)}, indent=2))
    else:
        _print_counts(found, out)


def _text_sources(config: RunConfig, names: tuple[str, ...]) -> list[SourceSection]:
    """The sources of raw text, or those that are named. Raises ConfigError where there is none."""
    from dsft.errors import ConfigError

    texts = [section for section in config.data.sources if section.format == "text"]
    known = ", ".join(section.name for section in texts) or "none"
    for name in names:
        if name not in [section.name for section in texts]:
            raise ConfigError(
                f"--source {name}: {config.file} has no source of raw text (format: text) of that name; it has {known}."
            )
    if not texts:
        raise ConfigError(f"{config.file}: pairs are made out of raw text, and no source has format: text; add one.")
    return [section for section in texts if not names or section.name in names]


def _print_counts(found: BridgeCounts, out: Path) -> None:
    rules = ", ".join(f"{rule} {count:,}" for rule, count in found.pairs.items())
    click.echo(f"{out}: {found.num_pairs:,} pairs ({rules}) from {found.documents:,} documents")
    for count, what in (
        (found.bad, "bad records left out"),
        (found.repeated, "documents left out: the same text as an earlier one"),
        (found.held_out, "documents left out: held out"),
        (found.repeated_pairs, "pairs left out: the same as an earlier one"),
        (found.held_out_pairs, "pairs left out: they share words with a held-out set"),
    ):
        if count:
            click.echo(f"{count:,} {what}")

"""``dsft data audit``: which sources, and the findings as a table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsft.config.models import RunConfig
    from dsft.corpus.audit import SourceAudit

_PROGRESS_SECONDS = 2.0
_COUNTS = (
    "bad", "refused", "empty", "unsupervised", "end_of_turn_cut", "overlong", "duplicates", "near_duplicates",
    "broken_encoding",
)  # fmt: skip


def audit_run(config: RunConfig, name: str | None) -> list[SourceAudit]:
    """Audit the training sources of a run, or the one called ``name``. Raises ConfigError where there is none."""
    from dsft.corpus.audit import audit_source, held_out_ngrams
    from dsft.errors import ConfigError
    from dsft.train.setup import open_tokenizer

    sections = [section for section in config.data.sources if name in (None, section.name)]
    if not sections:
        names = ", ".join(section.name for section in config.data.sources)
        raise ConfigError(f"--source {name}: {config.file} has no source of that name; it has {names}.")
    tokenizer = open_tokenizer(config)
    words = config.data.audit.ngram_words
    held_out = {section.name: held_out_ngrams(section, tokenizer, words) for section in config.evaluate.sets}
    found = []
    for section in sections:
        said = time.monotonic()

        def progress(rows: int, source: str = section.name) -> None:
            nonlocal said
            if time.monotonic() - said >= _PROGRESS_SECONDS:
                said = time.monotonic()
                click.echo(f"{source}: {rows:,} rows", err=True)

        found.append(audit_source(section, config.data, tokenizer, held_out, progress))
    return found


def print_audits(found: list[SourceAudit]) -> None:
    """A block a source: one line a finding, with its share of the rows."""
    for one in found:
        click.echo(f"{one.name}: {one.rows:,} rows, {one.tokens:,} tokens, {one.supervised_share:.1%} supervised")
        counts = {key.replace("_", " "): getattr(one, key) for key in _COUNTS}
        counts |= {f"overlaps {name}": count for name, count in one.contaminated.items()}
        width = max(len(label) for label in counts)
        for label, count in counts.items():
            click.echo(f"  {label:<{width}} {count:>12,}  {one.share(count):8.3%}")
        histogram = ", ".join(f"to {bound:,}: {rows:,}" for bound, rows in one.lengths.items())
        click.echo(f"  tokens a row          {histogram or 'none'}")
        for reason, count, place in one.reasons:
            click.echo(f"  {count:,} times, first at {place}: {reason}")

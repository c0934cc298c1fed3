"""``dsft report RUN``: one page about a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where to write. [report.html and report.md in the run's folder]"
)
def command(run: Path, out: Path | None) -> None:
    """Write RUN/report.html (self-contained) and RUN/report.md: what ran, curves, verdicts, answers."""
    from dsft.fsio import write_bytes
    from dsft.report.history import read_history
    from dsft.report.page import html_page, markdown

    history = read_history(run)
    target = (out or run / "report.html").with_suffix(".html")
    write_bytes(target, html_page(history).encode())
    write_bytes(target.with_suffix(".md"), markdown(history).encode())
    click.echo(f"{target}, {target.with_suffix('.md')}")

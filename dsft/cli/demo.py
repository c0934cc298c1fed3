"""``dsft demo``: the main job on an embedded corpus, with a verdict."""

from __future__ import annotations

from pathlib import Path

import click

from dsft.constants import EXIT_OK, EXIT_RUN_FAILED


@click.command("demo")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/demo"),
    show_default=True,
    help="Where everything is written.",
)
def command(folder: Path) -> int:
    """Train a small model in three stages on a corpus made from this Python, and judge it on held-out data.

    Exits with 1 if one of its claims does not hold.
    """
    from rich.console import Console

    from dsft.demo.run import run_demo

    summary = run_demo(folder, Console())
    return EXIT_OK if summary.holds else EXIT_RUN_FAILED

"""``dsft logs RUN``: what the ranks said, in the order of time."""

from __future__ import annotations

import time
from pathlib import Path

import click

_POLL_SECONDS = 0.5


@click.command("logs")
@click.argument("run_dir", metavar="RUN", type=click.Path(exists=True, file_okay=False))
@click.option("--rank", "ranks", multiple=True, type=click.IntRange(min=0), help="Only this rank; may be repeated.")
@click.option("--level", type=click.Choice(["info", "warning", "error"]), default="info", help="The least to show.")
@click.option("--follow", "-f", is_flag=True, help="Go on as the run goes on, until Ctrl-C.")
def command(run_dir: str, ranks: tuple[int, ...], level: str, follow: bool) -> None:
    """Show the logs of the ranks of a run together, each line with its rank in front."""
    from dsft.errors import ConfigError
    from dsft.launch.rank_log import LogReader

    reader = LogReader(Path(run_dir), frozenset(ranks), level)
    if not reader.has_files() and not follow:
        which = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        raise ConfigError(f"{run_dir} has no logs{which} yet; they are in {run_dir}/logs once the run has begun.")
    while True:
        for rank, line in reader.new_lines():
            click.echo(f"[{rank}] {line}")
        if not follow:
            return
        time.sleep(_POLL_SECONDS)

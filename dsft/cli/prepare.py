"""``dsft prepare``: raw data to token stores."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsft.config.models import RunConfig
    from dsft.corpus.progress import PrepareProgress


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: --set data.bad_records=skip."
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that tokenise.")
@click.option("--array", is_flag=True, help="The tasks of this SLURM job array share the work; the last completes it.")
def command(file: Path, overrides: tuple[str, ...], workers: int, array: bool) -> None:
    """Turn the raw data of RUN.yaml into token stores.

    What is prepared already is kept; a command that was stopped continues where it was. Under mpirun and srun the
    processes share the work. `dsft train` does the same by itself, with its ranks as the workers.
    """
    from dsft.config.load import load_config
    from dsft.errors import ConfigError
    from dsft.store.layout import MANIFEST_NAME
    from dsft.store.reader import SourceStore
    from dsft.world import share_of_work

    config = load_config(file, overrides)
    worker, num_workers = share_of_work(os.environ, of_array=array)
    if num_workers > 1 and workers > 1:
        raise ConfigError("--workers: the processes that were started share the work; start more of them instead.")
    folders = prepare_share(config, worker, num_workers, array) if num_workers > 1 else prepare_run(config, workers)
    for folder in folders if worker == 0 or array else []:
        if not (folder / MANIFEST_NAME).is_file():
            click.echo(f"{folder.name}: this task's share is prepared; the task that finishes last completes it.")
            continue
        manifest = SourceStore(folder).manifest
        left_out = "".join(f", {count:,} {reason.replace('_', ' ')}" for reason, count in manifest.counts.items())
        click.echo(
            f"{manifest.name}: {int(manifest.num_documents.sum()):,} documents, "
            f"{int(manifest.num_tokens.sum()):,} tokens in {len(manifest.raw_names):,} shards{left_out} -> {folder}"
        )


def prepare_run(config: RunConfig, num_workers: int) -> list[Path]:
    """Prepare every source and held-out set of a run with a progress display on stderr; returns the store folders."""
    from functools import partial

    from dsft.config.evaluation import EvaluationSetSection
    from dsft.config.models import SourceSection
    from dsft.corpus.workers import prepare_with_workers
    from dsft.train.setup import open_tokenizer
    from dsft.train.stores import store_folder

    make_tokenizer = partial(open_tokenizer, config)
    sections: list[SourceSection | EvaluationSetSection] = [*config.data.sources, *config.evaluate.sets]
    with progress_display() as progress:
        return prepare_with_workers(
            make_tokenizer, sections, store_folder(config), num_workers, config.data.bad_records, progress
        )


def prepare_share(config: RunConfig, worker: int, num_workers: int, array: bool) -> list[Path]:
    """Prepare what is this process's of a run, and wait for the others (in a job array: do not wait)."""
    from dsft.config.evaluation import EvaluationSetSection
    from dsft.config.models import SourceSection
    from dsft.corpus.prepare import prepare_sources
    from dsft.corpus.progress import no_progress
    from dsft.train.setup import open_tokenizer
    from dsft.train.stores import store_folder
    from dsft.world import discover_world

    if not array:  # ranks of one host share its cores
        local_size = discover_world(os.environ, None).local_size
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_size)))
    sections: list[SourceSection | EvaluationSetSection] = [*config.data.sources, *config.evaluate.sets]
    with progress_display() as display:
        return prepare_sources(
            sections,
            open_tokenizer(config),
            store_folder(config),
            worker,
            num_workers,
            config.data.bad_records,
            display if worker == 0 or array else no_progress,
            waits=not array,
        )


@contextmanager
def progress_display() -> Iterator[Callable[[PrepareProgress], None]]:
    """A bar on a terminal, a line every few seconds elsewhere; both on stderr."""
    from dsft.corpus.progress import ProgressLines

    if not sys.stderr.isatty():
        yield ProgressLines(lambda line: click.echo(line, err=True))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[summary]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        lines = ProgressLines(bar.console.print, every_seconds=float("inf"))
        task = bar.add_task("prepare", total=None, summary="")

        def show(progress: PrepareProgress) -> None:
            lines(progress)
            done, total = lines.done_bytes
            bar.update(task, description=progress.source, completed=done, total=total, summary=lines.summary())

        yield show

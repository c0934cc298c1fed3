"""``dsft slurm``: the batch script of a run, written and, if asked for, submitted."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("slurm")
@click.argument("config_file", metavar="RUN.yaml", type=click.Path())
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Number of nodes.")
@click.option("--gpus-per-node", type=click.IntRange(min=0), default=8, show_default=True, help="0 on a CPU cluster.")
@click.option(
    "--tasks-per-node", type=click.IntRange(min=1), help="Ranks on a node; default: one for each GPU, at least one."
)
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="Processors of a rank.")
@click.option("--time", "time_limit", required=True, metavar="D-HH:MM:SS", help="Time limit of one start of the job.")
@click.option(
    "--signal-seconds",
    type=click.IntRange(min=1),
    help="When before the time limit the ranks save and stop; default: by the saves that the run has measured.",
)
@click.option(
    "--max-requeues", type=click.IntRange(min=0), default=50, show_default=True, help="Starts after the first."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the run.")
@click.option(
    "--option", "options", multiple=True, metavar="OPTION", help="More for sbatch, e.g. --option=--partition=gpu."
)
@click.option("--after", metavar="JOB", help="Start when this job has ended well (stages of several runs).")
@click.option("--setup", multiple=True, metavar="LINE", help="Shell line before the start, e.g. 'module load cuda'.")
@click.option("--python", default=sys.executable, show_default=True, help="Interpreter of the ranks, on every node.")
@click.option("--out", type=click.Path(path_type=Path), help="The script; default: RUN.sbatch beside RUN.yaml.")
@click.option("--submit", is_flag=True, help="Hand it to sbatch and print the id of the job.")
def command(
    config_file: str,
    nodes: int,
    gpus_per_node: int,
    tasks_per_node: int | None,
    cpus_per_task: int | None,
    time_limit: str,
    signal_seconds: int | None,
    max_requeues: int,
    overrides: tuple[str, ...],
    options: tuple[str, ...],
    after: str | None,
    setup: tuple[str, ...],
    python: str,
    out: Path | None,
    submit: bool,
) -> None:
    """Write a batch script that trains RUN.yaml under SLURM, saves before the time limit, requeues and resumes.

    dsft slurm run.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --submit
    """
    from dsft import fsio
    from dsft.config.load import load_config
    from dsft.launch import slurm

    config = load_config(config_file, overrides)
    job = slurm.Job(
        name=config.run.name,
        config=config_file,
        run_dir=config.run.dir,
        nodes=nodes,
        tasks_per_node=tasks_per_node or max(gpus_per_node, 1),
        gpus_per_node=gpus_per_node,
        time_limit=time_limit,
        signal_seconds=signal_seconds or slurm.measured_signal_seconds(Path(config.run.dir)),
        max_requeues=max_requeues,
        python=python,
        cpus_per_task=cpus_per_task,
        overrides=overrides,
        options=(*options, *((f"--dependency=afterok:{after}",) if after else ())),
        setup=setup,
    )
    script = out or Path(config_file).with_suffix(".sbatch")
    text = slurm.write_script(job)
    Path(f"{config.run.dir}-slurm").parent.mkdir(parents=True, exist_ok=True)  # sbatch makes no folder for its log
    fsio.write_bytes(script, text.encode())
    click.echo(slurm.submit(script) if submit else str(script))

"""``dsft launch``: ``deepspeed``, started again when the run fails or hangs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsft.config.models import RunConfig


@click.command("launch")
@click.argument("config_file", metavar="RUN.yaml", type=click.Path())
@click.option("--num_gpus", "--num-gpus", type=click.IntRange(min=1), help="Ranks on each host; default: its devices.")
@click.option("--hostfile", type=click.Path(), help="Hosts, as for deepspeed: 'name slots=N', one a line.")
@click.option(
    "--max-restarts", type=click.IntRange(min=0), default=3, show_default=True, help="In a row without new checkpoint."
)
@click.option("--min-nodes", type=click.IntRange(min=1), help="Go on without hosts that are lost, with at least N.")
@click.option("--master_addr", "--master-addr", help="Address of rank 0, where the hosts do not find it themselves.")
@click.option("--resume", metavar="auto|if-any|CHECKPOINT", help="Of the first start, as for dsft train.")
@click.option("--allow-data-change", is_flag=True, help="As for dsft train.")
@click.option("--allow-lr-jump", is_flag=True, help="As for dsft train.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as for dsft train.")
@click.option("--max-seconds", type=float, help="Of each start, as for dsft train.")
def command(
    config_file: str,
    num_gpus: int | None,
    hostfile: str | None,
    max_restarts: int,
    min_nodes: int | None,
    master_addr: str | None,
    resume: str | None,
    allow_data_change: bool,
    allow_lr_jump: bool,
    overrides: tuple[str, ...],
    max_seconds: float | None,
) -> int:
    """Run `deepspeed ... --module dsft train RUN.yaml` and watch it.

    A run that fails, or a rank that hangs, ends the whole start; the next one goes on from the last checkpoint. The run
    is finished when its own record says so. With a hostfile every start first checks the hosts, as dsft doctor does,
    and brings this host's HF_*, WANDB_*, OMP_*, NCCL_*, GLOO_* and DSFT_* variables to the others. SIGTERM and Ctrl-C
    stop it with everything saved (exit code 75).
    """
    from dsft.config.hostfile import parse_hostfile
    from dsft.config.load import load_config
    from dsft.launch.supervise import Job, supervise
    from dsft.metrics.console import set_up_logging

    set_up_logging(is_main=True, who="launch")
    config = load_config(config_file, overrides)
    arguments = ["train", config_file]
    for override in overrides:
        arguments += ["--set", override]
    for name, is_set in {"--allow-data-change": allow_data_change, "--allow-lr-jump": allow_lr_jump}.items():
        arguments += [name] if is_set else []
    if max_seconds is not None:
        arguments += ["--max-seconds", str(max_seconds)]
    job = Job(
        run_dir=Path(config.run.dir),
        train_arguments=tuple(arguments),
        resume=resume,
        num_gpus=num_gpus,
        hosts=() if hostfile is None else parse_hostfile(hostfile),
        max_restarts=max_restarts,
        min_nodes=min_nodes,
        files=run_files(config_file, config),
        master_addr=master_addr,
    )
    return supervise(job)


def run_files(config_file: str, config: RunConfig) -> tuple[str, ...]:
    """The files that a run reads on every host, and that must be the same there."""
    files = [config_file, *([config.deepspeed] if isinstance(config.deepspeed, str) else [])]
    return tuple(str(Path(file).absolute()) for file in files)

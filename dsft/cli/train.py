"""``dsft train RUN.yaml``: unchanged under deepspeed, torchrun, srun, mpirun, and alone."""

from __future__ import annotations

import os

import click


@click.command("train")
@click.argument("config_file", metavar="RUN.yaml", type=click.Path())
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. --set train.lr=1e-5."
)
@click.option(
    "--resume",
    metavar="auto|if-any|CHECKPOINT",
    help="Go on from the newest whole checkpoint of the run (auto: none there is an error; if-any: then from the "
    "beginning), or from the one named.",
)
@click.option(
    "--allow-data-change", is_flag=True, help="Resume although a change of the configuration alters the data order."
)
@click.option(
    "--allow-lr-jump", is_flag=True, help="Resume although the learning rate had decayed and would be far higher again."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show steps, tokens, epochs, files and memory of the first batch, and prove the model and the sinks; train "
    "nothing.",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Stop in time to have everything saved so many seconds after the start (exit code 75).",
)
@click.option("--profile-steps", metavar="FIRST:END", help="Write a torch profiler trace of these steps (0-based).")
@click.pass_context
def command(
    context: click.Context,
    config_file: str,
    overrides: tuple[str, ...],
    resume: str | None,
    allow_data_change: bool,
    allow_lr_jump: bool,
    dry_run: bool,
    max_seconds: float | None,
    profile_steps: str | None,
) -> int:
    """Train as RUN.yaml says.

    deepspeed --hostfile hosts.txt --module dsft train run.yaml
    """
    from dsft.config.load import load_config
    from dsft.errors import ConfigError
    from dsft.launch.ancestors import Launcher
    from dsft.launch.environment import adopt_secrets

    launcher = Launcher.find()
    adopt_secrets(os.environ)
    from dsft.train.profiling import parse_steps

    config = load_config(config_file, overrides)
    if dry_run and config.data.streaming:
        raise ConfigError(
            "--dry-run counts the documents of the whole run, and with data.streaming they are not tokenised yet. "
            "Add --set data.streaming=false, which prepares all of them first."
        )
    steps = parse_steps(profile_steps)
    from dsft.train.start import Options, start

    options = Options(
        resume=resume,
        allow_data_change=allow_data_change,
        allow_lr_jump=allow_lr_jump,
        dry_run=dry_run,
        profile_steps=steps,
        max_seconds=max_seconds,
    )
    return start(config, options, launcher=launcher, local_rank_argument=(context.obj or {}).get("local_rank"))

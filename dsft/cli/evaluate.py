"""``dsft eval MODEL RUN.yaml``: measure held-out sets on a model or checkpoint, and compare two of them."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("eval")
@click.argument("model", metavar="CHECKPOINT|MODEL")
@click.argument("config_file", metavar="RUN.yaml", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of RUN.yaml.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the results. Start the same command again to go on where it stopped.",
)
@click.option(
    "--against",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Results of another model on the same sets: print the paired differences.",
)
@click.pass_context
def command(
    context: click.Context, model: str, config_file: str, overrides: tuple[str, ...], out: Path, against: Path | None
) -> int:
    """Measure the held-out sets (evaluate.sets) of RUN.yaml on a model; alone or under any launcher.

    deepspeed --hostfile hosts.txt --module dsft eval runs/medical run.yaml --out results/medical
    """
    from dsft.config.load import load_config

    config = load_config(config_file, overrides)
    from dsft.train.evaluate_model import compare, differences_as_lines, evaluate_model
    from dsft.world import discover_world

    local_rank = (context.obj or {}).get("local_rank")
    code = evaluate_model(config, model, out, local_rank_argument=local_rank)
    if against is not None:
        import os

        if discover_world(os.environ, local_rank).rank == 0:
            for line in differences_as_lines(compare(against, out, config.run.seed)):
                click.echo(line)
    return code

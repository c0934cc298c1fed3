"""``dsft config``: show or check a run's configuration, or print its JSON schema. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

import click

_FILE = click.argument("file", type=click.Path(path_type=Path))
_SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: --set train.lr=1e-5. Repeatable."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Show or check a configuration, or print its JSON schema."""


@command.command()
@_FILE
@_SET
def show(file: Path, overrides: tuple[str, ...]) -> None:
    """Print the resolved configuration, defaults included, as YAML."""
    import yaml

    from dsft.config.load import config_to_json, load_config

    values = config_to_json(load_config(file, overrides))
    click.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100), nl=False)


@command.command()
@_FILE
@_SET
@click.option(
    "--world-size", type=click.IntRange(min=1), help="Ranks to check batch sizes for. [default: run.world_size or 1]"
)
def check(file: Path, overrides: tuple[str, ...], world_size: int | None) -> None:
    """Check a configuration and the DeepSpeed JSON it names. Looks at no data and no model."""
    from dsft.config.deepspeed import build_deepspeed_config
    from dsft.config.load import load_config

    config = load_config(file, overrides)
    ranks = world_size or config.run.world_size or 1
    merged = build_deepspeed_config(config, ranks, "cuda")
    stage = merged.get("zero_optimization", {}).get("stage", 0)
    micro_batches = merged["gradient_accumulation_steps"]
    click.echo(
        f"{file} is valid: {len(config.data.sources)} source(s), ZeRO stage {stage}; at {ranks} rank(s) a step is "
        f"{config.train.global_batch_packs} packs of {config.data.pack_tokens} tokens, in {micro_batches} "
        f"micro-batch(es) of {config.train.micro_batch_packs} a rank."
    )


@command.command()
def schema() -> None:
    """Print the JSON schema of the YAML, for completion in editors.

    For example: dsft config schema > dsft.schema.json, and in the YAML's first line:
    # yaml-language-server: $schema=dsft.schema.json
    """
    from dsft.config.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))

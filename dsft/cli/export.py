"""``dsft export``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Literal

import click

_UNIT_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B)?\s*", re.IGNORECASE)


def _size_bytes(_context: click.Context, _parameter: click.Parameter, value: str) -> int:
    """Bytes of a file size such as ``5GB`` (powers of 1000), at least one."""
    match = _SIZE.fullmatch(value)
    size = int(Decimal(match.group(1)) * _UNIT_BYTES[(match.group(2) or "").upper()]) if match else 0
    if size < 1:
        raise click.BadParameter(f"{value!r} is not a size; write for example 500MB or 5GB (powers of 1000)")
    return size


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Type of weights."
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    callback=_size_bytes,
    default="5GB",
    show_default=True,
    help="Largest weight file.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that lies in the checkpoint.")
def command(
    checkpoint: Path, out: Path, dtype: Literal["bf16", "fp32"], max_shard_size: int, trust_remote_code: bool
) -> None:
    """Write CHECKPOINT (or the newest checkpoint of a run folder) to OUT, for plain transformers."""
    from dsft.export.hugging_face import export_checkpoint
    from dsft.export.resolve import checkpoint_of

    source = checkpoint_of(checkpoint)
    export_checkpoint(source, out, dtype, max_shard_size, trust_remote_code=trust_remote_code)
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"{source} -> {out}: {dtype}, {num_bytes / 1e9:.2f} GB")

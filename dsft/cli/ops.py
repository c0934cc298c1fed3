"""``dsft ops build|info``: dsft's native operations."""

from __future__ import annotations

import json

import click


@click.group("ops")
def command() -> None:
    """Build dsft's native operations, or say what is built."""


@command.command("build")
def build() -> None:
    """Build the native libraries that are not built yet: for the CPU, and for CUDA where a GPU is."""
    import torch

    from dsft.ops.build import build_cpu_library, build_cuda_library

    click.echo(f"built: {build_cpu_library()}")
    if torch.cuda.is_available():
        click.echo(f"built: {build_cuda_library()}")


@command.command("info")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(as_json: bool) -> None:
    """Say which compiler and sources are used, and where the library is. Builds nothing."""
    from dsft.ops.build import compiler, cpu_library_path, source_folder

    library = cpu_library_path()
    values = {
        "compiler": compiler(),
        "sources": str(source_folder()),
        "library": str(library),
        "built": library.exists(),
    }
    if as_json:
        click.echo(json.dumps(values))
        return
    for name, value in values.items():
        click.echo(f"{name:9} {value}")

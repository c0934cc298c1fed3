"""``dsft ops build|info|check|bench``: dsft's native operations."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from dsft.ops.bench import Figure

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="auto: CUDA where torch finds a device.",
)


@click.group("ops")
def command() -> None:
    """Build dsft's native operations, say which are in use, check them and time them."""


@command.command("build")
@device_option
def build(device: str) -> None:
    """Build the native libraries that are not built yet: for the CPU, and for CUDA where a GPU is.

    With --device cuda for CUDA on a machine without a GPU too (nvcc is needed).
    """
    from dsft.ops.build import build_cpu_library, build_cuda_library

    click.echo(f"built: {build_cpu_library()}")
    if device == "cuda" or (device == "auto" and _device("auto").type == "cuda"):
        click.echo(f"built: {build_cuda_library()}")


@command.command("info")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(as_json: bool) -> None:
    """Say what is built, for which processors, and what each operation would use and why. Builds nothing."""
    from dsft.ops.info import describe

    found = describe()
    if as_json:
        click.echo(json.dumps(found))
        return
    for key in ("torch", "sources"):
        click.echo(f"{key:9} {found[key]}")
    for name, library in found["libraries"].items():
        if "missing" in library:
            click.echo(f"{name:9} {library['missing']}")
            continue
        click.echo(f"{name:9} {'built' if library['built'] else 'not built'}: {library['path']}")
        click.echo(f"{'':9} for {', '.join(library['architectures'])}")
    for name, uses in found["operations"].items():
        click.echo(f"{name}")
        for device, backend in uses.items():
            click.echo(f"    {device:5} {backend}")


@command.command("check")
@device_option
@click.option("--kernels", type=click.Choice(["auto", "native", "reference"]), default="native")
def check(device: str, kernels: str) -> int:
    """Compare every operation with torch in fp64, on the device at hand. Exit code 1 where one is wrong."""
    from dsft.ops import backend
    from dsft.ops.check import run_checks

    where = _device(device)
    backend.choose(kernels, where.type)  # type: ignore[arg-type]
    failed = total = 0
    worst: dict[str, float] = {}
    for one in run_checks(where):
        total += 1
        if one.bound > 0:
            worst[one.operation] = max(worst.get(one.operation, 0.0), one.error / one.bound)
        if not one.passed:
            failed += 1
            click.echo(f"FAILED {one.operation}, {one.case}: error {one.error:.2e}, bound {one.bound:.2e}", err=True)
    for operation, share in worst.items():
        click.echo(f"{operation}: largest error {share:.0%} of its bound")
    click.echo(f"{total - failed} of {total} checks passed on {_name(where)}")
    return 1 if failed else 0


@command.command("bench")
@device_option
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Sizes begun within this time are timed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object and nothing else.")
def bench(device: str, seconds: float, as_json: bool) -> None:
    """Time the loss beside torch's and its peers (pip install 'dsft[bench]'); name those that are not installed."""
    from dsft.ops import backend, peers
    from dsft.ops.bench import errors, measure, to_json

    where = _device(device)
    backend.choose("native", where.type)
    sides = {side.name: side.about for side in peers.sides(where.type)}
    if not as_json:
        for name, about in sides.items():
            click.echo(f"{name}: {about}")
    found = []
    for figure in measure(where, seconds):
        found.append(to_json(figure))
        if not as_json:
            click.echo(_line(figure))
    gradients = errors(where)
    if as_json:
        click.echo(json.dumps({"device": _name(where), "sides": sides, "figures": found, "errors": gradients}))
        return
    for record in gradients:
        shown = record.get("problem") or f"dX {record['dX']:.2e}  dW {record['dW']:.2e}"
        click.echo(f"error, {record['logits']:8} {record['side']:28} {shown}")


def _line(figure: Figure) -> str:
    size = figure.size
    cell = f"{size.tokens:6} x {size.vocab:6} {size.masked:4.0%} masked, {size.logits:8} {figure.side:28}"
    if figure.problem is not None:
        return f"{cell} {figure.problem}"
    memory = "" if figure.peak_bytes is None else f"{figure.peak_bytes / 2**20:9.0f} MiB"
    return f"{cell} {figure.milliseconds:9.2f} ms {memory} {figure.useful_tflops:7.2f} TFLOP/s"


def _device(name: str) -> torch.device:
    import torch

    from dsft.errors import KernelError

    if name == "cuda" and not torch.cuda.is_available():
        raise KernelError("--device cuda, but torch finds no CUDA device here (torch.cuda.is_available() is False).")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"

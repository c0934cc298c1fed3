"""``dsft estimate RUN.yaml``: memory, time and cost of a run, before it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsft.advise.estimate import Assumptions, Choice, Estimate
    from dsft.advise.machines import Machines
    from dsft.config.models import RunConfig

_VERDICT = {True: "fits", False: "does not fit", None: "fits if the host does"}


@click.command("estimate")
@click.argument("config_file", metavar="RUN.yaml", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the run.")
@click.option("--hosts", metavar="4x8xH100-80GB", help="Hosts, devices a host, device and its memory.")
@click.option("--hostfile", type=click.Path(), help="Hosts and slots from a hostfile; needs --device.")
@click.option("--device", metavar="H100-80GB", help="What the slots of --hostfile are.")
@click.option("--here", is_flag=True, help="This machine.")
@click.option("--host-memory", metavar="SIZE", help="Memory of a host, such as 2TB.")
@click.option("--network-gbit", type=click.FloatRange(min=0, min_open=True), help="Gbit/s out of a host. [default 400]")
@click.option("--price", type=click.FloatRange(min=0), help="Money for a device and hour.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak that is reached. [0.4]")
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), help="Or: TFLOP/s that a device reaches.")
@click.option("--supervised-share", type=click.FloatRange(0, 1), default=1.0, help="Tokens that are learned. [1]")
@click.option("--document-tokens", type=click.IntRange(min=1), help="Length of a typical document. [a pack]")
@click.option("--data-tokens", type=click.IntRange(min=1), help="Tokens of an epoch, where train.epochs is given.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(config_file: str, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Memory, time and cost of RUN.yaml on given machines. Needs no GPU and reads no weights."""
    from dsft.advise.estimate import DEFAULT_MFU, Assumptions, estimate, to_json
    from dsft.config.load import load_config

    config = load_config(config_file, overrides)
    assumptions = Assumptions(
        mfu=options["mfu"] if options["mfu"] is not None else DEFAULT_MFU,
        tflops=options["tflops"],
        price=options["price"],
        supervised_share=options["supervised_share"],
        document_tokens=options["document_tokens"],
        data_tokens=options["data_tokens"],
    )
    result = estimate(config, _machines(options), assumptions, _deepspeed_files(config))
    if as_json:
        click.echo(json.dumps(to_json(result, assumptions), indent=1))
    else:
        _print(result, assumptions)


def _machines(options: dict[str, Any]) -> Machines:
    """The machines of exactly one of --hosts, --hostfile, --here."""
    from dataclasses import replace

    from dsft.advise.machines import machines_of_hostfile, parse_hosts, parse_size, this_machine

    if sum(bool(options[name]) for name in ("hosts", "hostfile", "here")) != 1:
        raise click.UsageError("give the machines with one of --hosts, --hostfile (and --device), --here")
    if options["hostfile"] and not options["device"]:
        raise click.UsageError("a hostfile does not say what its slots are; give --device, for example H100-80GB")
    if options["hosts"]:
        machines = parse_hosts(options["hosts"])
    elif options["hostfile"]:
        machines = machines_of_hostfile(options["hostfile"], options["device"])
    else:
        machines = this_machine()
    if options["host_memory"]:
        machines = replace(machines, host_bytes=parse_size(options["host_memory"], "--host-memory"))
    if options["network_gbit"]:
        machines = replace(machines, network_bandwidth=options["network_gbit"] * 1e9 / 8)
    return machines


def _deepspeed_files(config: RunConfig) -> list[Path]:
    """Configurations to try: those beside the run's own, or ``ds_configs/`` of the working directory."""
    folder = Path(config.deepspeed).parent if isinstance(config.deepspeed, str) else Path("ds_configs")
    return sorted(folder.glob("*.json"))


def _print(result: Estimate, assumptions: Assumptions) -> None:
    machines, written = result.machines, result.written
    click.echo(
        f"{result.shape.num_parameters:,} parameters ({result.shape.num_trained:,} trained) on {machines.num_hosts} x "
        f"{machines.devices_per_host} {machines.device_name} with {machines.device_bytes / 1e9:.0f} GB"
    )
    click.echo(f"\nmemory of a rank as written ({written.deepspeed}), GB:")
    for part in written.memory.parts:
        when = "" if part.when == "always" else f"  ({part.when} only)"
        click.echo(f"  {part.name:<32} {part.place:<7} {part.num_bytes / 1e9:9.2f}{when}")
    click.echo(
        f"  peak: {written.memory.peak('device') / 1e9:.2f} GB a device, {written.memory.peak('host') / 1e9:.2f} GB a "
        f"host, {written.memory.peak('nvme') / 1e9:.2f} GB of disk a host: {_VERDICT[written.fits]}"
    )
    click.echo(f"  largest micro-batch as written: {result.largest_micro_batch_packs} packs")
    click.echo("\neffect of one change:")
    _table([written, *result.choices], named=True)
    if result.configurations:
        click.echo("\nDeepSpeed configurations, each at its best micro-batch:")
        _table(list(result.configurations), named=False)
    _print_cost(result, assumptions)


def _table(choices: list[Choice], *, named: bool) -> None:
    click.echo(f"  {'':<34} {'checkpointing':<14} {'packs':>5} {'device GB':>10} {'host GB':>9} {'hours':>9}")
    for choice in choices:
        name = choice.name if named else Path(choice.deepspeed).name
        hours = "?" if choice.hours is None else f"{choice.hours:.2f}"
        click.echo(
            f"  {name:<34} {'on' if choice.checkpointing else 'off':<14} {choice.micro_batch_packs:>5} "
            f"{choice.memory.peak('device') / 1e9:>10.2f} {choice.memory.peak('host') / 1e9:>9.2f} {hours:>9} "
            f"{_VERDICT[choice.fits]}"
        )


def _print_cost(result: Estimate, assumptions: Assumptions) -> None:
    if result.fastest is not None:
        best = result.fastest
        click.echo(
            f"\nfastest that fits: {best.deepspeed}, activation_checkpointing {'on' if best.checkpointing else 'off'}, "
            f"micro_batch_packs {best.micro_batch_packs}: {best.hours:.2f} hours"
        )
    step = result.written.step
    if step is None or result.device_hours is None:
        click.echo(f"\n{result.steps:,} steps; the speed of this device is not known: give --tflops for time and cost")
        return
    click.echo(
        f"\nas written: {result.steps:,} steps of {step.total:.2f} s (compute {step.compute:.2f}, communication not "
        f"hidden {step.exposed_communication:.2f}, offload {step.offload:.2f}) = {result.written.hours:.2f} hours = "
        f"{result.device_hours:.1f} device-hours"
    )
    if assumptions.price is not None:
        click.echo(f"cost: {result.device_hours * assumptions.price:,.2f} at {assumptions.price:g} a device and hour")
    said = f"{assumptions.tflops:g} TFLOP/s" if assumptions.tflops is not None else f"MFU {assumptions.mfu:g}"
    click.echo(f"times are computed from {said} and the links' stated rates, not measured")

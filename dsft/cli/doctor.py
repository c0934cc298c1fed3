"""``dsft doctor``: asks every host of a run at once and says what would go wrong, and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsft.config.hostfile import Host
    from dsft.config.models import RunConfig
    from dsft.launch.checks import Finding, Probed, Wanted

_SIGN = {"ok": "ok  ", "warning": "warn", "failure": "FAIL"}


@click.command("doctor")
@click.argument("config_file", metavar="[RUN.yaml]", required=False, type=click.Path())
@click.option("--hostfile", type=click.Path(), help="Hosts to ask over ssh; without it and --slurm: this one.")
@click.option("--slurm", "in_slurm", is_flag=True, help="Ask the nodes of the SLURM job that this is started in.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of RUN.yaml.")
@click.option("--folder", "folders", multiple=True, type=click.Path(), help="A folder that all hosts must share.")
@click.option("--master_port", "--master-port", type=int, help="A port that must be free on the first host.")
@click.option("--no-bandwidth", is_flag=True, help="Do not measure how fast the hosts talk to each other.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings and each host's report as JSON.")
def command(
    config_file: str | None,
    hostfile: str | None,
    in_slurm: bool,
    overrides: tuple[str, ...],
    folders: tuple[str, ...],
    master_port: int | None,
    no_bandwidth: bool,
    as_json: bool,
) -> int:
    """Check hosts before a run: reachable, same code and versions, folders, devices, memory, disk, clock, network.

    With RUN.yaml also whether the run fits. The exit code is 1 if anything fails; every failing line says what to do.
    """
    from dsft.config.load import load_config
    from dsft.constants import EXIT_OK, EXIT_RUN_FAILED
    from dsft.launch.checks import Wanted, judge
    from dsft.launch.preflight import ask_hosts, ask_slurm

    hosts = _hosts(hostfile, in_slurm)
    config = None if config_file is None else load_config(config_file, overrides)
    wanted = Wanted(folders=_existing(folders), port=master_port, python=sys.executable, environ=dict(os.environ))
    findings: list[Finding] = []
    if hostfile is not None:
        wanted, findings = _with_environment(wanted)
    if config is not None and config_file is not None:
        wanted = _with_run(wanted, config_file, config)
    probed = ask_slurm(hosts, wanted) if in_slurm else ask_hosts(hosts, wanted)
    if config is not None:
        wanted, more = _with_needs(wanted, config, probed)
        findings += more
    findings += judge(probed, wanted)
    if len(hosts) > 1 and not no_bandwidth and not any(one.level == "failure" for one in findings):
        findings += _bandwidth(probed, wanted, in_slurm)
    if as_json:
        reports = {one.host.name: one.report for one in probed}
        click.echo(json.dumps({"findings": [asdict(one) for one in findings], "hosts": reports}, indent=1))
    else:
        _print(findings)
    return EXIT_RUN_FAILED if any(one.level == "failure" for one in findings) else EXIT_OK


def _hosts(hostfile: str | None, in_slurm: bool) -> tuple[Host, ...]:
    from dsft.config.hostfile import Host, parse_hostfile
    from dsft.world import expand_nodelist

    if hostfile is not None and in_slurm:
        raise click.UsageError("give one of --hostfile and --slurm")
    if hostfile is not None:
        return parse_hostfile(hostfile)
    if in_slurm:
        if "SLURM_JOB_NODELIST" not in os.environ:
            raise click.UsageError(
                "--slurm asks the nodes of a job; start it in one: salloc --nodes=2 dsft doctor --slurm"
            )
        slots = int(os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE") or 1)
        return tuple(Host(name, slots) for name in expand_nodelist(os.environ["SLURM_JOB_NODELIST"]))
    return (Host("localhost", 1),)


def _with_environment(wanted: Wanted) -> tuple[Wanted, list[Finding]]:
    """What deepspeed's ssh brings to the other hosts, and what is wrong with ``.deepspeed_env``."""
    from dsft.errors import LaunchError
    from dsft.launch.checks import Finding
    from dsft.launch.environment import environment_files, travelling

    files = environment_files(os.environ, Path.cwd(), Path.home())
    try:
        return replace(wanted, environ=travelling(os.environ, files)), []
    except LaunchError as error:
        where, _, what = str(error).partition(": ")
        text, _, fix = what.partition(". ")
        return wanted, [Finding("environment", "failure", f"{where}: {text}", fix)]


def _with_run(wanted: Wanted, config_file: str, config: RunConfig) -> Wanted:
    from dsft.cli.launch import run_files
    from dsft.config.remote_path import is_remote

    store = config.data.store_dir or str(Path(config.run.dir).parent)
    shared = (config.run.dir,) if is_remote(store) else (config.run.dir, store)
    folders = [*wanted.folders, *_existing(shared)]
    files = run_files(config_file, config)
    wanted = replace(wanted, folders=list(dict.fromkeys(folders)), files=files)
    local_dir = config.checkpoint.local_dir
    if local_dir is None:
        return wanted
    return replace(wanted, local_dir=str(Path(local_dir).absolute()), run_dir=_existing((config.run.dir,))[0])


def _existing(folders: tuple[str, ...]) -> list[str]:
    """The folders, or what there is already of the way to them."""
    found = []
    for folder in folders:
        path = Path(folder).absolute()
        found.append(str(next(one for one in (path, *path.parents) if one.is_dir())))
    return found


def _with_needs(wanted: Wanted, config: RunConfig, probed: list[Probed]) -> tuple[Wanted, list[Finding]]:
    """What the run needs of these hosts, by ``dsft estimate``, and how many ranks it asks for."""
    from dsft.advise.estimate import Assumptions, estimate
    from dsft.advise.machines import Machines
    from dsft.config.deepspeed import build_deepspeed_config
    from dsft.launch.checks import Finding
    from dsft.launch.native_ops import needed_ops
    from dsft.train.setup import is_offloaded, uses_nvme

    reports = [one.report for one in probed if one.report is not None]
    if not reports:
        return wanted, []
    slots = max(one.host.slots for one in probed)
    memory_bytes = min(report["memory_bytes"] for report in reports)
    gpus = reports[0]["gpus"]
    name, device_bytes = (gpus[0][0], int(gpus[0][1]) << 20) if gpus else ("CPU", memory_bytes // slots)
    machines = Machines(len(probed), slots, name, device_bytes, memory_bytes)
    result = estimate(config, machines, Assumptions(data_tokens=1), [])
    is_gpu = machines.device_type == "cuda"
    deepspeed_config = build_deepspeed_config(config, machines.num_ranks, machines.device_type)
    offloaded, nvme = is_offloaded(deepspeed_config), uses_nvme(deepspeed_config)
    shape, kept = result.shape, config.checkpoint.keep_last + 1  # the new one is whole before the oldest goes
    checkpoint_bytes = 12 * shape.num_trained + 4 * (shape.num_parameters - shape.num_trained)
    wanted = replace(
        wanted,
        host_bytes=float(result.written.memory.peak("host")),
        device_bytes=float(result.written.memory.peak("device")) if is_gpu else None,
        disk_bytes=float(kept * checkpoint_bytes) if wanted.local_dir is None else None,
        local_bytes=kept * checkpoint_bytes / machines.num_ranks,
        ops=needed_ops("cuda" if is_gpu else "cpu", cpu_adam=offloaded, nvme=nvme),
        is_offloaded=offloaded,
    )
    ranks = sum(one.host.slots for one in probed)
    if config.run.world_size in (None, ranks):
        return wanted, []
    text = f"run.world_size asks for {config.run.world_size} ranks, and the hosts have {ranks} slots"
    return wanted, [Finding("slots", "failure", text, "Change run.world_size or the slots of the hostfile.")]


def _bandwidth(probed: list[Probed], wanted: Wanted, in_slurm: bool) -> list[Finding]:
    from dsft.launch.bandwidth import MARK, judge_bandwidth
    from dsft.launch.checks import Finding
    from dsft.launch.hosts import ask_all, over_ssh
    from dsft.launch.preflight import address_of_first

    first = probed[0].report
    assert first is not None
    request = {
        "size": len(probed),
        "address": address_of_first(probed),
        "port": first["free_port"],
        "device": "cuda" if all(one.report and one.report["gpus"] for one in probed) else "cpu",
    }
    path = ":".join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    named = {name: value for name, value in wanted.environ.items() if name.startswith(("GLOO_", "NCCL_"))}
    start = ["env", f"PYTHONPATH={path}", *(f"{name}={value}" for name, value in named.items())]
    start += [wanted.python, "-m", "dsft.launch.bandwidth"]
    if in_slurm:
        srun = ["srun", f"--nodes={len(probed)}", f"--ntasks={len(probed)}", "--ntasks-per-node=1", "--overlap"]
        commands = [[*srun, *start, json.dumps({**request, "rank": None})]]
    else:
        commands = [
            over_ssh(one.host.name, [*start, json.dumps({**request, "rank": rank})]) for rank, one in enumerate(probed)
        ]
    answers = ask_all(commands, limit_seconds=120.0)
    for answer in answers:
        for line in answer.output.splitlines():
            if line.startswith(MARK):
                return judge_bandwidth(json.loads(line.removeprefix(MARK)), [one.host.name for one in probed])
    said = next(
        (answer.errors.strip().splitlines()[-1] for answer in answers if answer.errors.strip()), "no answer in time"
    )
    fix = f"Open all ports between the hosts (firewall), and look whether they reach {request['address']}."
    return [Finding("bandwidth", "failure", f"the hosts did not find each other: {said}", fix)]


def _print(findings: list[Finding]) -> None:
    width = max(len(one.check) for one in findings)
    for one in findings:
        click.echo(f"{_SIGN[one.level]}  {one.check:<{width}}  {one.text}")
        if one.fix:
            click.echo(f"{'':<{width + 8}}{one.fix}")

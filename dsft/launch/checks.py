"""What is wrong with the hosts of a run, judged from what their probes say. Nothing here asks anybody anything."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dsft.config.hostfile import Host
from dsft.launch.hosts import SSH_FAILED, Answer

Level = Literal["ok", "warning", "failure"]
CLOCK_WARNING_SECONDS = 5.0
CLOCK_FAILURE_SECONDS = 60.0
SHM_BYTES_PER_RANK = 66 * 2**20
"""What DeepSpeed's CPU collectives take of /dev/shm for a rank; NCCL's rings take less."""
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        check: what was looked at.
        text: what was found, with the hosts' names.
        fix: what to do; empty where nothing is wrong.
    """

    check: str
    level: Level
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Probed:
    """One host and what came of asking it.

    Attributes:
        report: what :func:`dsft.launch.probe.report` gave there; None: nothing did.
        answer: of the command that was to bring it.
        came: the shared folders in which the file that this host left was seen by whoever asked.
    """

    host: Host
    report: dict[str, Any] | None
    answer: Answer
    came: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the hosts must have.

    Attributes:
        folders: that all hosts must see and be able to write.
        files: that must be there and the same on every host.
        local_dir: ``checkpoint.local_dir``, and ``run_dir``, on whose file system it should not be; None: no such.
        port: wanted on the first host; None: any free one.
        environ: the variables that travel to the hosts.
        host_bytes, device_bytes, disk_bytes: memory of a host and of a device, and shared disk that the run needs;
            None: not known.
        local_bytes: that a rank's shards take in ``local_dir``; None: not known.
        ops: DeepSpeed's ops that it needs.
        is_offloaded: it keeps state in the memory of the hosts.
        python: the interpreter that deepspeed will start on every host.
    """

    folders: Sequence[str] = ()
    files: Sequence[str] = ()
    local_dir: str | None = None
    run_dir: str | None = None
    port: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    host_bytes: float | None = None
    device_bytes: float | None = None
    disk_bytes: float | None = None
    local_bytes: float | None = None
    ops: Sequence[str] = ()
    is_offloaded: bool = False
    python: str = "python"


def judge(probed: Sequence[Probed], wanted: Wanted) -> list[Finding]:
    """Every finding, in the order of the table. The first host is that of rank 0."""
    findings = list(_reached(probed, wanted))
    there = [one for one in probed if one.report is not None]
    if there:
        for check in _CHECKS:
            findings += check(there, wanted)
    return findings


def _reached(probed: Sequence[Probed], wanted: Wanted) -> Iterable[Finding]:
    silent = [one for one in probed if one.report is None]
    for one in silent:
        text, fix = _trouble(one, wanted.python)
        yield Finding("reachable", "failure", f"{one.host.name}: {text}", fix)
    if not silent:
        slowest = max(one.answer.received - one.answer.sent for one in probed)
        yield Finding("reachable", "ok", f"{len(probed)} hosts answered within {slowest:.1f} s")


def _trouble(one: Probed, python: str) -> tuple[str, str]:
    """Why a host gave no report, and what to do, from what ssh says (its words are those of OpenSSH)."""
    name, answer = one.host.name, one.answer
    lines = answer.errors.strip().splitlines()
    said = lines[-1] if lines else ""
    if answer.code is None:
        return "no answer in time", f"Look whether the host is up and not overloaded: ssh {name} true"
    if answer.code != SSH_FAILED:
        if answer.code in (126, 127):
            return f"there is no {python} ({said})", "Install the same environment at the same path on every host."
        return f"the probe failed with exit code {answer.code}: {said}", f"Look at it: ssh {name} {python} --version"
    for pattern, text, fix in _SSH_TROUBLES:
        if re.search(pattern, answer.errors, re.IGNORECASE):
            return text, fix.format(name=name)
    return f"ssh failed: {said}", f"Try it by hand: ssh -v {name} true"


_SSH_TROUBLES = (
    (
        "resolve hostname",
        "no such host is known here",
        "Correct the name in the hostfile, or add {name} to DNS, /etc/hosts or ~/.ssh/config.",
    ),
    (
        "host key verification failed|REMOTE HOST IDENTIFICATION",
        "ssh does not know the host's key, or knows another one",
        "Accept it once by hand: ssh {name} true (where the key was changed on purpose, first: ssh-keygen -R {name})",
    ),
    ("permission denied", "ssh has no key that the host accepts", "Install yours there: ssh-copy-id {name}"),
    ("connection refused", "no sshd listens there", "Start sshd on {name}, or give its port in ~/.ssh/config."),
    (
        "timed out|no route to host|unreachable|reset by peer|closed by",
        "the host does not answer on the network",
        "Look whether {name} is up and no firewall keeps ssh out: ping {name}",
    ),
)


def _versions(there: Sequence[Probed], _: Wanted) -> Iterable[Finding]:
    """Same code, same Python, same packages: a rank with others would train another model, or hang."""
    fix = "Use one environment on a folder that all hosts see, or install the same versions there."
    yield _same("Python", there, lambda report: report["python"], fix)
    yield _same("packages", there, lambda report: _pairs(report["packages"]), fix)
    yield _same(
        "CUDA and NCCL",
        there,
        lambda report: _pairs({"CUDA": report["cuda"], "NCCL": report["nccl"]}),
        "Install the same torch wheel on every host.",
    )
    yield _same(
        "driver and devices",
        there,
        lambda report: (
            ", ".join(sorted({f"{name} driver {driver}" for name, _, _, driver in report["gpus"]})) or "no GPU"
        ),
        "Install the same driver; hosts with other devices wait for the slowest in every step.",
        "warning",
    )
    yield _same(
        "dsft's code",
        there,
        lambda report: report["code"] or "none (not installed there)",
        "Install the same version of dsft on every host, or keep it on a folder that all hosts see.",
    )


def _same(
    check: str, there: Sequence[Probed], value: Callable[[dict[str, Any]], str], fix: str, level: Level = "failure"
) -> Finding:
    """A finding on what should be equal on all hosts; the fewer are those who are named first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for one in there:
        assert one.report is not None
        groups[value(one.report)].append(one.host.name)
    if len(groups) == 1:
        return Finding(check, "ok", f"{next(iter(groups))} on every host")
    parts = sorted(groups.items(), key=lambda item: len(item[1]))
    return Finding(check, level, "; ".join(f"{_names(names)}: {what}" for what, names in parts), fix)


def _files(there: Sequence[Probed], wanted: Wanted) -> Iterable[Finding]:
    for path in wanted.files:
        yield _same(
            f"file {path}",
            there,
            lambda report, path=path: report["files"][path] or "not there",  # type: ignore[misc]
            "Keep it on a folder that all hosts see, or copy it to the same path on every host.",
        )


def _folders(there: Sequence[Probed], wanted: Wanted) -> Iterable[Finding]:
    for folder in wanted.folders:
        states = [(one, one.report["folders"][folder]) for one in there if one.report is not None]
        missing = [one.host.name for one, state in states if not state["exists"]]
        other = [
            one.host.name
            for one, state in states
            if state["exists"] and not (state["sees"] and (state["error"] or folder in one.came))
        ]
        refused = [f"{one.host.name} ({state['error']})" for one, state in states if state["exists"] and state["error"]]
        check = f"folder {folder}"
        if missing:
            yield Finding(check, "failure", f"not there on {_names(missing)}", "Mount the shared file system there.")
        if other:
            text = f"{_names(other)} has another folder of that name: it is not shared"
            yield Finding(check, "failure", text, "Mount the same file system on every host, or put run.dir on one.")
        if refused:
            text = f"cannot be written by {_names(refused)}"
            yield Finding(check, "failure", text, "Correct the mount or the owner of the folder there.")
        if not missing and not other and not refused:
            yield Finding(check, "ok", "shared and written by every host")
        yield from _disk(check, states, wanted.disk_bytes)


def _disk(check: str, states: list[tuple[Probed, dict[str, Any]]], needed: float | None) -> Iterable[Finding]:
    free = [state["free_bytes"] for _, state in states if state["free_bytes"] is not None]
    if needed is not None and free and min(free) < needed:
        text = f"{min(free) / _GB:.2f} GB are free, and the checkpoints take {needed / _GB:.2f} GB"
        yield Finding(check, "failure", text, "Free some, choose another run.dir, or lower checkpoint.keep_last.")


def _local_dir(there: Sequence[Probed], wanted: Wanted) -> Iterable[Finding]:
    """Each host stores the shards of its own ranks there, and copies of those of the host before it."""
    if wanted.local_dir is None:
        return
    check, found = f"local_dir {wanted.local_dir}", []
    states = [(one.host, one.report["local_dir"]) for one in there if one.report is not None]
    for number, (host, state) in enumerate(states):
        slots = host.slots + (states[number - 1][0].slots if len(states) > 1 else 0)
        needed = slots * (wanted.local_bytes or 0.0)
        if state["error"]:
            text = f"{host.name}: cannot be written ({state['error']})"
            found.append(Finding(check, "failure", text, "Make it, under the same path, on a disk of every host."))
        elif state["free_bytes"] < needed:
            text = f"{host.name}: {state['free_bytes'] / _GB:.2f} GB are free, and the shards of {slots} ranks take "
            fix = "Free some, choose another folder, or lower checkpoint.keep_last."
            found.append(Finding(check, "failure", f"{text}{needed / _GB:.2f} GB", fix))
    if shared := [host.name for host, state in states if state["is_on_run_dir"]]:
        text = f"on {_names(shared)} on the file system of run.dir: one of them is not what it should be"
        found.append(Finding(check, "warning", text, "Name a folder on a disk of the host, and share run.dir."))
    yield from found or [Finding(check, "ok", "a disk of its own, written by every host")]


def _devices(there: Sequence[Probed], wanted: Wanted) -> Iterable[Finding]:
    """Slots against devices, or against processors where no host has a device."""
    reports = [(one.host, one.report) for one in there if one.report is not None]
    kind = "gpus" if any(report["gpus"] for _, report in reports) else "cores"
    is_wrong = False
    for host, report in reports:
        number = len(report["gpus"]) if kind == "gpus" else report["cores"]
        if host.slots > number:
            is_wrong = True
            what = "GPUs" if kind == "gpus" else "processors"
            text = f"{host.name}: the hostfile says slots={host.slots}, and it has {number} {what}"
            yield Finding("slots", "failure", text, f"Write slots={number}, or look why nvidia-smi shows no more.")
        for gpu, total, free, _ in report["gpus"][: host.slots]:
            if wanted.device_bytes is not None and float(free) * 2**20 < wanted.device_bytes:
                is_wrong = True
                needs = f"the run needs {wanted.device_bytes / _GB:.1f} GB"
                text = f"{host.name}: {free} of {total} MiB are free on a {gpu}; {needs}"
                yield Finding("slots", "failure", text, "End what uses the device (nvidia-smi), or see: dsft estimate")
    if not is_wrong:
        yield Finding("slots", "ok", ", ".join(f"{host.name} {host.slots}" for host, _ in reports))


def _memory(there: Sequence[Probed], wanted: Wanted) -> Iterable[Finding]:
    reports = [(one.host, one.report) for one in there if one.report is not None]
    few = [f"{host.name} ({report['memory_bytes'] / _GB:.1f} GB)" for host, report in reports
           if wanted.host_bytes is not None and report["memory_bytes"] < wanted.host_bytes]  # fmt: skip
    if few and wanted.host_bytes is not None:
        text = f"the run needs {wanted.host_bytes / _GB:.1f} GB of a host's memory; too little is free on {_names(few)}"
        yield Finding(
            "memory", "failure", text, "End other programs, use more hosts, or see what else fits: dsft estimate"
        )
    else:
        least = min(report["memory_bytes"] for _, report in reports)
        yield Finding("memory", "ok", f"at least {least / _GB:.1f} GB free on a host")
    small = [host.name for host, report in reports
             if report["shm_bytes"] is None or report["shm_bytes"] < SHM_BYTES_PER_RANK * host.slots]  # fmt: skip
    if small:
        text = f"/dev/shm is too small for {SHM_BYTES_PER_RANK >> 20} MiB a rank on {_names(small)}"
        yield Finding(
            "/dev/shm",
            "failure",
            text,
            "Start the container with --shm-size=16g or --ipc=host; else remove old files there.",
        )
    least = wanted.host_bytes or 2**30
    locked = [
        host.name for host, report in reports if report["memlock_bytes"] is not None and report["memlock_bytes"] < least
    ]
    if wanted.is_offloaded and locked:
        text = f"the limit of locked memory (ulimit -l) is small on {_names(locked)}; NVMe offload needs it"
        yield Finding(
            "ulimit", "warning", text, "Set 'memlock unlimited' in /etc/security/limits.conf and log in again."
        )


def _clocks(there: Sequence[Probed], _: Wanted) -> Iterable[Finding]:
    """A probe ran between the question and its answer; what its clock says beyond that is its error."""
    off = {}
    for one in there:
        assert one.report is not None
        ahead, behind = one.report["began"] - one.answer.received, one.answer.sent - one.report["ended"]
        off[one.host.name] = ahead if ahead > 0 else -behind if behind > 0 else 0.0
    worst = max(abs(seconds) for seconds in off.values())
    if worst <= CLOCK_WARNING_SECONDS:
        yield Finding("clock", "ok", "no host is off by more than a few seconds")
        return
    wrong = [f"{name} ({seconds:+.0f} s)" for name, seconds in off.items() if abs(seconds) > CLOCK_WARNING_SECONDS]
    level: Level = "failure" if worst > CLOCK_FAILURE_SECONDS else "warning"
    yield Finding(
        "clock", level, f"off on {_names(wrong)}", "Start chronyd or systemd-timesyncd there: chronyc makestep"
    )


def _network(there: Sequence[Probed], wanted: Wanted) -> Iterable[Finding]:
    """The interface that gloo and NCCL will use on each host, and the port of rank 0."""
    reports = [(one.host.name, one.report) for one in there if one.report is not None]
    is_wrong = False
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = wanted.environ.get(variable)
        lacking = [
            f"{name} (which has {_pairs(report['interfaces'])})"
            for name, report in reports
            if value is not None and not value.startswith("^") and not _matches(value, report["interfaces"])
        ]
        if lacking:
            is_wrong = True
            text = f"{variable}={value}, but no such interface is up on {_names(lacking)}"
            fix = f"Unset {variable} (dsft takes the interface of the route to rank 0), or correct it."
            yield Finding("interface", "failure", text, fix)
    first = reports[0][0]
    lost = [name for name, report in reports[1:] if report["first"]["address"] is None]
    if lost:
        text = f"{_names(lost)} does not know the name {first} of the host of rank 0"
        yield Finding("interface", "warning", text, f"Add {first} to DNS or /etc/hosts there, or give --master_addr.")
    if not is_wrong:
        known = {report["first"]["address"] for _, report in reports[1:]}
        chosen = [f"{name} {_chosen(report, wanted.environ, known)}" for name, report in reports]
        yield Finding("interface", "ok", _names(chosen))
    if wanted.port is not None and not reports[0][1]["is_port_free"]:
        text = f"{first}: port {wanted.port} is taken by another program"
        yield Finding("port", "failure", text, "Leave --master_port out: a free one is found. Or end the other run.")


def _matches(value: str, interfaces: Mapping[str, str]) -> bool:
    """NCCL takes prefixes, and whole names after '='; gloo one or more names."""
    if value.startswith("="):
        return any(name in interfaces for name in value[1:].split(","))
    return any(one.startswith(name) for one in interfaces for name in value.split(","))


def _chosen(report: dict[str, Any], environ: Mapping[str, str], known: set[str | None]) -> str:
    """What :func:`dsft.address.choose_interface` will take; ``known`` are addresses of the host of rank 0."""
    if "GLOO_SOCKET_IFNAME" in environ:
        return environ["GLOO_SOCKET_IFNAME"]
    own = {report["first"]["own"], *known}
    return next((name for name, address in report["interfaces"].items() if address in own and name != "lo"), "lo")


def _ops(there: Sequence[Probed], wanted: Wanted) -> Iterable[Finding]:
    reports = [(one.host, one.report) for one in there if one.report is not None]
    held = {lock for _, report in reports for lock, holder in report["locks"].items() if holder is not None}
    stale: dict[str, list[str]] = defaultdict(list)
    for host, report in reports:
        for lock in set(report["locks"]) - held:
            stale[lock].append(host.name)
    for lock, names in sorted(stale.items()):
        text = f"no process holds {lock} on {_names(names)}; a plain DeepSpeed would wait for it for ever"
        yield Finding("op locks", "failure", text, f"Remove it (dsft train does so, too): rm {lock}")
    lacks = {host.name: [op for op in wanted.ops if op not in report["ops"]] for host, report in reports}
    without = [host.name for host, report in reports if "async_io" in lacks[host.name] and not report["libaio"]]
    if without:
        text = f"libaio's header, with which NVMe offload's async_io is built, is not on {_names(without)}"
        yield Finding("libaio", "failure", text, "Install libaio-dev (Debian), libaio-devel (RHEL), or offload to cpu.")
    elif missing := [f"{name} ({', '.join(ops)})" for name, ops in lacks.items() if ops]:
        text = f"DeepSpeed's ops are not built yet on {_names(missing)}; the first start does it, in minutes"
        unbuilt = " ".join(op for op in wanted.ops if any(op in ops for ops in lacks.values()))
        yield Finding("ops", "warning", text, f"Build them ahead: {wanted.python} -m dsft.launch.native_ops {unbuilt}")
    elif not stale:
        yield Finding("ops", "ok", "built, and no lock was left behind")


_CHECKS = (_versions, _files, _folders, _local_dir, _devices, _memory, _clocks, _network, _ops)


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in values.items())


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"

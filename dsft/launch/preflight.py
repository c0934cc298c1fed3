"""Before a start on several hosts: ask them all, judge, and choose the address and the port of rank 0."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.config.hostfile import Host
from dsft.errors import LaunchError
from dsft.fsio import save_error
from dsft.launch import probe
from dsft.launch.checks import Finding, Probed, Wanted, judge
from dsft.launch.hosts import LIMIT_SECONDS, Answer, ask_all, over_ssh

logger = logging.getLogger(__name__)

_PATIENT_SECONDS = 60.0
_REPAIRED_AT_START = ("op locks",)
"""Checks of the doctor that need not keep a run from starting: dsft train removes such a lock."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a start will run.

    Attributes:
        hosts: of this start; the first one holds rank 0.
        master_addr, master_port: of rank 0.
        names: of the hosts in the hostfile, by what each one calls itself.
    """

    hosts: tuple[Host, ...]
    master_addr: str
    master_port: int
    names: Mapping[str, str]

    @property
    def is_here(self) -> bool:
        """It has one host, and that is this one: deepspeed needs no ssh then."""
        return len(self.hosts) == 1 and is_here(self.hosts[0])


def is_here(host: Host) -> bool:
    """The name is one of this host's own."""
    return host.name in ("localhost", "127.0.0.1", socket.gethostname())


def ask_hosts(hosts: Sequence[Host], wanted: Wanted, limit_seconds: float = LIMIT_SECONDS) -> list[Probed]:
    """Probe all hosts at the same time over ssh; the only host of a run, if it is this one, without."""
    nonce = uuid.uuid4().hex
    commands = []
    for number, host in enumerate(hosts):
        words = [wanted.python, "-", _request(hosts[0], number, nonce, wanted)]
        commands.append(words if len(hosts) == 1 and is_here(host) else over_ssh(host.name, words))
    with _Marks(wanted.folders, nonce) as marks:
        answers = ask_all(commands, Path(probe.__file__).read_text(), limit_seconds)
        return [
            Probed(host, _read(answer), answer, marks.of(number))
            for number, (host, answer) in enumerate(zip(hosts, answers, strict=True))
        ]


def ask_slurm(hosts: Sequence[Host], wanted: Wanted) -> list[Probed]:
    """Probe the nodes of this SLURM job, one task on each."""
    nonce = uuid.uuid4().hex
    words = ["srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--overlap"]
    words += [wanted.python, "-", _request(hosts[0], None, nonce, wanted)]
    with _Marks(wanted.folders, nonce) as marks:
        (answer,) = ask_all([words], Path(probe.__file__).read_text(), limit_seconds=60.0)
        reports = {report["number"]: report for line in answer.output.splitlines() if (report := _read_line(line))}
        return [Probed(host, reports.get(number), answer, marks.of(number)) for number, host in enumerate(hosts)]


class _Marks:
    """Files in the shared folders: one of this host that the others look for, and one that each of them leaves."""

    def __init__(self, folders: Sequence[str], nonce: str) -> None:
        self._folders, self._nonce = folders, nonce

    def __enter__(self) -> _Marks:
        for folder in self._folders:
            path = Path(folder) / f".dsft-{self._nonce}"
            try:
                path.touch()
            except OSError as error:
                raise save_error(path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._folders:
            for path in Path(folder).glob(f".dsft-{self._nonce}*"):
                path.unlink(missing_ok=True)

    def of(self, number: int) -> frozenset[str]:
        """The folders in which the file of this host came to light here."""
        return frozenset(folder for folder in self._folders if Path(folder, f".dsft-{self._nonce}-{number}").exists())


def _request(first: Host, number: int | None, nonce: str, wanted: Wanted) -> str:
    python_path = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    return json.dumps(
        {
            "number": number,
            "nonce": nonce,
            "folders": list(wanted.folders),
            "files": list(wanted.files),
            "local_dir": wanted.local_dir,
            "run_dir": wanted.run_dir,
            "search": [os.getcwd(), *python_path],
            "first": first.name,
            "port": wanted.port,
            "cache": wanted.environ.get("DSFT_CACHE_DIR"),
            "extensions": wanted.environ.get("TORCH_EXTENSIONS_DIR"),
        }
    )


def _read(answer: Answer) -> dict[str, Any] | None:
    return next((report for line in answer.output.splitlines() if (report := _read_line(line))), None)


def _read_line(line: str) -> dict[str, Any] | None:
    if not line.startswith(probe.MARK):
        return None
    report: dict[str, Any] = json.loads(line.removeprefix(probe.MARK))
    return report


def place(hosts: Sequence[Host], wanted: Wanted, *, min_nodes: int | None, master_addr: str | None) -> Placement:
    """Check the hosts of a start, and choose which of them are used and where rank 0 listens.

    Args:
        min_nodes: hosts that do not answer are left out while so many are left; None: all must answer.
        master_addr: address of rank 0, where the user knows better.

    Raises:
        LaunchError: something is wrong that would keep the run from working; every finding with what to do.
    """
    probed = ask_hosts(hosts, wanted)
    if any(one.answer.code is None for one in probed):  # up but slow, and a run must not lose a host for that
        probed = ask_hosts(hosts, wanted, _PATIENT_SECONDS)
    there = [one for one in probed if one.report is not None]
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        raise LaunchError("deepspeed starts ranks on other hosts with pdsh, which is not installed here. Install pdsh.")
    if min_nodes is not None and len(there) < len(probed):
        silent = ", ".join(one.host.name for one in probed if one.report is None)
        if len(there) < min_nodes:
            raise LaunchError(
                f"only {len(there)} of {len(hosts)} hosts answer, and --min-nodes asks for {min_nodes}: {silent} "
                "do not. Repair them (dsft doctor says what is wrong), or lower it."
            )
        logger.warning("without %s, which does not answer, this start goes on with fewer hosts", silent)
        probed = there
        if there[0].host != hosts[0]:  # another host holds rank 0 now, and all must know their way to it
            probed = ask_hosts([one.host for one in there], wanted)
    findings = judge(probed, wanted)
    for finding in findings:
        if finding.level == "warning":
            logger.warning("%s: %s. %s", finding.check, finding.text, finding.fix)
    failures = [one for one in findings if one.level == "failure" and one.check not in _REPAIRED_AT_START]
    if failures:
        raise LaunchError(describe(failures))
    first = probed[0].report
    assert first is not None
    names = {one.report["hostname"]: one.host.name for one in probed if one.report is not None}
    port = wanted.port if wanted.port is not None else int(first["free_port"])
    return Placement(tuple(one.host for one in probed), master_addr or address_of_first(probed), port, names)


def describe(failures: Sequence[Finding]) -> str:
    """All failures as one message."""
    lines = [f"{finding.check}: {finding.text}. {finding.fix}" for finding in failures]
    return lines[0] if len(lines) == 1 else "\n  ".join(["the hosts are not ready:", *lines])


def address_of_first(probed: Sequence[Probed]) -> str:
    """The address of the first host by the route that the others have to it.

    What they take its name for, if that is an address that it has; else what the ssh connections say.

    Raises:
        LaunchError: none is found.
    """
    first = probed[0].report
    assert first is not None
    if len(probed) == 1 and is_here(probed[0].host):
        return "127.0.0.1"
    own = {address for address in first["interfaces"].values() if not address.startswith("127.")}
    others = [one.report for one in probed[1:] if one.report is not None]
    candidates = [report["first"]["address"] for report in others]
    if first["hostname"] == socket.gethostname():  # the others' ssh connections come from there
        candidates += [report["ssh"][0] for report in others if report["ssh"]]
    candidates += first["ssh"][2:3]
    if len(own) == 1:
        candidates += own
    for candidate in candidates:
        if candidate in own:
            return str(candidate)
    raise LaunchError(
        f"no address of {probed[0].host.name}, which holds rank 0, is known by which the other hosts reach it; it has "
        f"{', '.join(sorted(own)) or 'none'}. Give it with --master_addr."
    )

"""Time until each misconfiguration of a cluster is found: by ``dsft doctor``, or at the start by ``dsft launch``.

Three hosts with networks of their own on this machine (needs root, sshd, pdsh, faketime), of which one is wrong, or the
hostfile or the environment is. Each case is one call, and counts only if the expected words are there. The last line is
one JSON object, in seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the hosts are those of the tests

from tests.support.namespaces import Network, network  # noqa: E402
from tests.support.wrong_hosts import HUGE, doctor, failures, write_inputs  # noqa: E402


@dataclass(frozen=True, slots=True)
class Case:
    """One misconfiguration.

    Attributes:
        hosts: with their slots, beside the host ``good``.
        words: that must be among what fails.
    """

    words: str
    hosts: dict[str, int] = field(default_factory=lambda: {"fine": 1})
    options: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    deepspeed_env: str | None = None


def cases(folder: Path) -> dict[str, Case]:
    """Every misconfiguration that the doctor finds, by name."""
    huge = ("run.yaml", "--set", f"model.config={HUGE}")
    return {
        "unknown host": Case("no such host is known here", {"unknown": 1}),
        "host without key": Case("ssh has no key that the host accepts", {"no-key": 1}),
        "no sshd": Case("no sshd listens there", {"no-sshd": 1}),
        "no Python": Case("there is no ", {"no-python": 1}),
        "other packages": Case("other-torch: torch 2.0.0", {"other-torch": 1}),
        "other code": Case("dsft's code: ", {"other-code": 1}),
        "folder not shared": Case("it is not shared", {"not-shared": 1}, ("--folder", f"{folder}/runs")),
        "port taken": Case("port 22 is taken", options=("--master_port", "22")),
        "blank line in .deepspeed_env": Case("this line is blank", deepspeed_env="NCCL_DEBUG=INFO\n\n"),
        "slots over devices": Case("the hostfile says slots=64", {"fine": 64}),
        "stale op lock": Case("op locks: ", options=huge[:1], environ={"TORCH_EXTENSIONS_DIR": f"{folder}/extensions"}),
        "clock off": Case("clock: off on late", {"late": 1}),
        "too little memory": Case("memory: the run needs", options=huge),
        "too little disk": Case("and the checkpoints take", options=huge),
        "wrong interface": Case("GLOO_SOCKET_IFNAME=eth7", environ={"GLOO_SOCKET_IFNAME": "eth7"}),
    }


def seconds_to_find(hosts: Network, folder: Path, case: Case) -> float:
    """From the command to its end; ends the benchmark where the case is not found."""
    variables = folder / ".deepspeed_env"
    if case.deepspeed_env is not None:
        variables.write_text(case.deepspeed_env)
    started = time.perf_counter()
    _, report = doctor(hosts["good"], folder, {"good": 1, **case.hosts}, *case.options, **case.environ)
    seconds = time.perf_counter() - started
    variables.unlink(missing_ok=True)
    said = failures(report)
    if case.words not in said:
        sys.exit(f"not found: {case.words!r} in\n{said}")
    return round(seconds, 2)


def seconds_without_a_hostfile(hosts: Network, folder: Path) -> float:
    """The same of ``dsft launch`` with a hostfile that is not there."""
    command = [sys.executable, "-m", "dsft", "launch", "--hostfile", "no-such-file.txt", "run.yaml"]
    started = time.perf_counter()
    done = subprocess.run(hosts["good"].command(command, folder), capture_output=True, text=True, check=False)
    if done.returncode != 2 or "no-such-file.txt" not in done.stderr:
        sys.exit(f"a hostfile that is not there: {done.returncode}, {done.stderr}")
    return round(time.perf_counter() - started, 2)


def main() -> None:
    """Measure, print, and end with one JSON object."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="dsft-doctor-") as name:
        folder = Path(name)
        wrong = write_inputs(folder)
        with network(folder / "net", ["good", "fine", *wrong], wrong) as hosts:
            result = {"no hostfile": seconds_without_a_hostfile(hosts, folder)}
            result |= {kind: seconds_to_find(hosts, folder, case) for kind, case in cases(folder).items()}
            started = time.perf_counter()
            _, report = doctor(hosts["good"], folder, {"good": 1, "fine": 1}, "run.yaml")
            seconds = round(time.perf_counter() - started, 2)
            if failures(report):
                sys.exit(f"the hosts that should be right are not: {failures(report)}")
    for kind, one in result.items():
        print(f"{kind:>30}: {one:5.2f} s")
    print(json.dumps({"benchmark": "doctor", "unit": "seconds", "found": result, "all_right_and_measured": seconds}))


if __name__ == "__main__":
    main()

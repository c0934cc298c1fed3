"""Hosts that are each wrong in a way of their own, and ``dsft doctor`` on one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.namespaces import Host
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import write_tiny_run

FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
PYTHON = os.path.realpath(sys.executable)
HUGE = "{model_type: llama, hidden_size: 16384, intermediate_size: 65536, num_hidden_layers: 40, vocab_size: 32000}"
"""A model that neither the memory of this machine nor its disk can hold."""


def write_inputs(folder: Path) -> dict[str, str]:
    """A tiny run in ``folder``, and what :func:`tests.support.namespaces.network` must do to each wrong host."""
    write_tiny_run(folder)
    for name in ("runs", "net", "packages", "other/torch-2.0.0.dist-info", "extensions/cpu_adam"):
        (folder / name).mkdir(parents=True)
    (folder / "extensions" / "cpu_adam" / "lock").touch()
    (folder / "other" / "torch-2.0.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.0.0\n")
    (folder / "constants.py").write_text("EXIT_OK = 1\n")
    return {
        "not-shared": f"mount -t tmpfs tmpfs {folder}/runs",
        "no-key": ": > /etc/ssh/authorized_keys",
        "no-python": f"mount --bind /dev/null {PYTHON}",
        "other-code": f"mount --bind {folder}/constants.py {REPOSITORY}/dsft/constants.py",
        "other-torch": f"mount --bind {folder}/other {folder}/packages",
        "late": f"echo SetEnv LD_PRELOAD={FAKETIME[0]} FAKETIME=-300s >> /etc/ssh/sshd_config",
        "no-sshd": "sshd() { :; }; command() { echo true; }",
    }


def doctor(
    host: Host, folder: Path, slots: Mapping[str, int], *options: str, **environ: str
) -> tuple[int, dict[str, Any]]:
    """Exit code and what ``--json`` says of the hosts with these slots."""
    (folder / "hosts.txt").write_text("".join(f"{name} slots={number}\n" for name, number in slots.items()))
    command = [sys.executable, "-m", "dsft", "doctor", "--hostfile", "hosts.txt", "--json", *options]
    path = f"{REPOSITORY}:{folder}/packages"
    answer = subprocess.run(
        host.command(command, folder),
        env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert answer.stdout, answer.stderr
    report = json.loads(answer.stdout)
    assert not list((folder / "runs").glob(".dsft-*")), "the files that show whether a folder is shared"
    return answer.returncode, report


def failures(report: dict[str, Any]) -> str:
    """What fails, one line each, with what to do."""
    wrong = [one for one in report["findings"] if one["level"] == "failure"]
    assert all(one["fix"] for one in wrong), wrong
    return "\n".join(f"{one['check']}: {one['text']} -> {one['fix']}" for one in wrong)

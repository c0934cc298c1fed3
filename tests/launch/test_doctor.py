"""``dsft doctor`` on hosts that are each wrong in a way of their own, and on hosts of which one has a slow network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import need
from tests.support.namespaces import Host, Network, network
from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import write_tiny_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
PYTHON = os.path.realpath(sys.executable)
HUGE = "{model_type: llama, hidden_size: 16384, intermediate_size: 65536, num_hidden_layers: 40, vocab_size: 32000}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    write_tiny_run(folder)
    for name in ("runs", "net", "packages", "other/torch-2.0.0.dist-info"):
        (folder / name).mkdir(parents=True)
    (folder / "other" / "torch-2.0.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.0.0\n")
    (folder / "constants.py").write_text("EXIT_OK = 1\n")
    return folder


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[Network]:
    need("faketime")
    wrong = {
        "not-shared": f"mount -t tmpfs tmpfs {folder}/runs",
        "no-key": ": > /etc/ssh/authorized_keys",
        "no-python": f"mount --bind /dev/null {PYTHON}",
        "other-code": f"mount --bind {folder}/constants.py {REPOSITORY}/dsft/constants.py",
        "other-torch": f"mount --bind {folder}/other {folder}/packages",
        "late": f"echo SetEnv LD_PRELOAD={FAKETIME[0]} FAKETIME=-300s >> /etc/ssh/sshd_config",
        "no-sshd": "sshd() { :; }; command() { echo true; }",
    }
    with network(folder / "net", ["good", "fine", "well", *wrong], wrong) as hosts:
        yield hosts


def doctor(
    host: Host, folder: Path, slots: dict[str, int], *options: str, **environ: str
) -> tuple[int, dict[str, Any]]:
    """Exit code and findings, by check and level."""
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


def test_every_host_that_is_wrong_is_named_with_what_to_do(folder: Path, hosts: Network) -> None:
    (folder / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n")
    (folder / "extensions" / "cpu_adam").mkdir(parents=True)
    (folder / "extensions" / "cpu_adam" / "lock").touch()
    slots = {"good": 1, "fine": 64, **dict.fromkeys(set(hosts.hosts) - {"good", "fine", "well"}, 1), "unknown": 1}
    environ = {"GLOO_SOCKET_IFNAME": "eth7", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    try:
        words = ["run.yaml", "--set", f"model.config={HUGE}", "--master_port", "22"]
        code, report = doctor(hosts["good"], folder, slots, *words, **environ)
    finally:
        (folder / ".deepspeed_env").unlink()
    assert code == 1
    said = failures(report)
    for expected in (
        f"environment: {folder}/.deepspeed_env, line 2: this line is blank",
        "reachable: unknown: no such host is known here -> Correct the name in the hostfile",
        "reachable: no-key: ssh has no key that the host accepts -> Install yours there: ssh-copy-id no-key",
        f"reachable: no-python: there is no {sys.executable}",
        "reachable: no-sshd: no sshd listens there",
        "packages: other-torch: torch 2.0.0, ",
        "dsft's code: other-code: ",
        f"folder {folder}/runs: not-shared has another folder of that name: it is not shared",
        "GB are free, and the checkpoints take ",
        "slots: fine: the hostfile says slots=64, and it has ",
        "memory: the run needs ",
        "clock: off on late (-",
        "interface: GLOO_SOCKET_IFNAME=eth7, but no such interface is up on good (which has lo 127.0.0.1, eth0 10.",
        "port: good: port 22 is taken by another program",
        f"op locks: no process holds {folder}/extensions/cpu_adam/lock on good, fine, ",
    ):
        assert expected in said, said
    assert report["hosts"]["other-code"]["python"] == report["hosts"]["good"]["python"]


def test_hosts_on_which_nothing_is_wrong_are_measured_and_a_slow_network_has_a_name(
    folder: Path, hosts: Network
) -> None:
    code, report = doctor(hosts["good"], folder, {"good": 1, "fine": 1}, "run.yaml")
    assert (code, failures(report)) == (0, "")
    hosts.slow_down("fine", 80)
    code, report = doctor(hosts["good"], folder, {"good": 1, "fine": 1, "well": 1})
    assert code == 1
    said = failures(report)
    assert "slow: good and fine " in said
    assert ", fine and well " in said
    assert "Look at the network of fine: cable, " in said

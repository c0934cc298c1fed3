"""``dsft doctor`` on hosts that are each wrong in a way of their own, and on hosts of which one has a slow network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launch import need
from tests.support.namespaces import Network, network
from tests.support.wrong_hosts import HUGE, doctor, failures, write_inputs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[Network]:
    need("faketime")
    wrong = write_inputs(folder)
    with network(folder / "net", ["good", "fine", "well", *wrong], wrong) as hosts:
        yield hosts


def test_every_host_that_is_wrong_is_named_with_what_to_do(folder: Path, hosts: Network) -> None:
    (folder / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n")
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

"""What the doctor says of hosts that cannot be made here: devices, drivers, several names of an interface."""

from __future__ import annotations

from typing import Any

import pytest

from dsft.config.hostfile import Host
from dsft.launch.checks import Finding, Probed, Wanted, judge
from dsft.launch.hosts import Answer
from dsft.launch.preflight import address_of_first

H100 = ["NVIDIA H100", "81559", "81000", "550.1"]

LOCAL = {"error": None, "free_bytes": 17e9, "is_on_run_dir": False}


def probed(name: str, slots: int = 8, gpus: int = 8, **changed: Any) -> Probed:
    """A host with eight GPUs on which nothing is wrong, but for what is changed."""
    report = {
        "hostname": name,
        "began": 100.5,
        "ended": 101.0,
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "cuda": "12.8",
        "nccl": "2.27",
        "code": "abc",
        "files": {},
        "folders": {},
        "local_dir": LOCAL,
        "gpus": [H100] * gpus,
        "cores": 64,
        "memory_bytes": 10**12,
        "shm_bytes": 10**11,
        "memlock_bytes": None,
        "interfaces": {"lo": "127.0.0.1", "ib0": "10.0.0.1", "eth0": "192.168.0.1"},
        "first": {"address": "192.168.0.1", "own": "192.168.0.1"},
        "ssh": ["192.168.0.9", "50000", "192.168.0.1", "22"],
        "is_port_free": True,
        "ops": ["cpu_adam"],
        "libaio": True,
        "locks": {},
        **changed,
    }
    return Probed(Host(name, slots), report, Answer(0, "", "", 100.0, 101.5))


def wrong(hosts: list[Probed], wanted: Wanted | None = None) -> list[Finding]:
    return [finding for finding in judge(hosts, wanted or Wanted(ops=["cpu_adam"])) if finding.level != "ok"]


@pytest.mark.parametrize(
    ("changed", "check", "text"),
    [
        ({"gpus": 4}, "slots", "b: the hostfile says slots=8, and it has 4 GPUs"),
        ({"nccl": "2.26"}, "CUDA and NCCL", "b: CUDA 12.8, NCCL 2.26; a, c: CUDA 12.8, NCCL 2.27"),
        ({"python": "3.12.1"}, "Python", "b: 3.12.1; a, c: 3.11.7"),
        ({"code": None}, "dsft's code", "b: none (not installed there); a, c: abc"),
        ({"began": 400.0}, "clock", "off on b (+298 s)"),
        ({"ended": 90.0}, "clock", "off on b (-10 s)"),
        ({"shm_bytes": 64 << 20}, "/dev/shm", "too small for 66 MiB a rank on b"),
        ({"locks": {"/x/lock": None}}, "op locks", "no process holds /x/lock on b"),
        ({"ops": []}, "ops", "not built yet on b (cpu_adam)"),
        ({"first": {"address": None, "own": None}}, "interface", "b does not know the name a"),
    ],
)
def test_the_host_that_differs_is_named(changed: dict[str, Any], check: str, text: str) -> None:
    (finding,) = wrong([probed("a"), probed("b", **changed), probed("c")])
    assert finding.check == check
    assert text in finding.text
    assert finding.fix


@pytest.mark.parametrize(
    ("changed", "level", "text"),
    [
        ({}, "ok", "a disk of its own, written by every host"),
        ({"error": "No such file or directory"}, "failure", "b: cannot be written (No such file or directory)"),
        ({"is_on_run_dir": True}, "warning", "on b on the file system of run.dir"),
        ({"free_bytes": 9e9}, "failure", "b: 9.00 GB are free, and the shards of 10 ranks take 10.00 GB"),
    ],
)
def test_the_disk_for_shards_is_looked_at_on_every_host(changed: dict[str, Any], level: str, text: str) -> None:
    hosts = [probed("a", slots=2), probed("b", local_dir={**LOCAL, **changed}), probed("c")]
    findings = judge(hosts, Wanted(local_dir="/scratch", run_dir="/shared", local_bytes=1e9))
    (found,) = [one for one in findings if one.check == "local_dir /scratch"]
    assert found.level == level
    assert text in found.text
    assert bool(found.fix) == (level != "ok")


def test_nvme_offload_needs_libaio_where_its_op_is_not_built() -> None:
    wanted = Wanted(ops=["cpu_adam", "pin_memory", "async_io"])
    built = probed("a", ops=wanted.ops, libaio=False)
    assert wrong([built], wanted) == []
    (missing,) = wrong([built, probed("b", libaio=False)], wanted)
    assert (missing.check, missing.level) == ("libaio", "failure")
    assert "is not on b" in missing.text
    assert "libaio-dev" in missing.fix
    (unbuilt,) = wrong([built, probed("b")], wanted)
    assert "b (pin_memory, async_io)" in unbuilt.text
    assert unbuilt.fix.endswith("native_ops pin_memory async_io")


def test_a_lock_that_another_host_holds_is_not_stale() -> None:
    assert wrong([probed("a", locks={"/x/lock": 17}), probed("b", locks={"/x/lock": None})]) == []


def test_names_of_interfaces_are_read_as_nccl_reads_them() -> None:
    for value, is_right in {
        "ib": True,
        "=ib": False,
        "=ib0": True,
        "^docker": True,
        "eth1,ib": True,
        "bond": False,
    }.items():
        found = wrong([probed("a")], Wanted(environ={"NCCL_SOCKET_IFNAME": value}))
        assert (found == []) == is_right, value


def test_memory_that_the_run_lacks_on_a_device_or_a_host() -> None:
    busy = probed("b", gpus=1, slots=1)
    assert busy.report is not None
    busy.report["gpus"] = [["NVIDIA H100", "81559", "9000", "550.1"]]
    (device, host) = wrong([busy], Wanted(device_bytes=40e9, host_bytes=2e12))
    assert "b: 9000 of 81559 MiB are free on a NVIDIA H100; the run needs 40.0 GB" in device.text
    assert "the run needs 2000.0 GB of a host's memory; too little is free on b (1000.0 GB)" in host.text


def test_the_address_of_rank_0_is_one_that_it_has_and_the_others_know() -> None:
    debian = {"address": "127.0.1.1", "own": "127.0.0.1"}  # what /etc/hosts says of a host's own name
    assert address_of_first([probed("a"), probed("b")]) == "192.168.0.1"
    assert address_of_first([probed("a", first=debian), probed("b", first={"address": "10.0.0.1"})]) == "10.0.0.1"
    by_ssh = [probed("a", first=debian), probed("b", first={"address": None, "own": None})]
    assert address_of_first(by_ssh) == "192.168.0.1"

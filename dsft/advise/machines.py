"""The machines a run is planned for: how many, what they hold, and how fast they are said to be.

The rates are the vendors' or stated assumptions, never measurements of the user's machines; every one can be given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from dsft.config.hostfile import parse_hostfile
from dsft.errors import ConfigError

GB = 10**9
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>MB|GB|TB)", re.IGNORECASE)
_UNIT_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
_HOSTS = re.compile(r"(?P<hosts>\d+)x(?P<devices>\d+)x(?P<device>.+)")
_DEVICE = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9 ]*)-(?P<size>\d.*)")

_PAIR_BANDWIDTH = {"GB200": 900e9, "B200": 900e9, "GH200": 450e9, "H200": 450e9, "H100": 450e9, "A100": 300e9}
"""Bytes a second and direction between two devices of one host, by NVLink (NVIDIA's data sheets: half of the sum of
both directions). Other devices are taken to talk over PCIe."""
PCIE_BANDWIDTH = 25e9
"""Bytes a second between a device and its host: PCIe 4.0 with 16 lanes gives 31.5 GB/s, about 25 of it to a copy."""
NETWORK_BANDWIDTH = 50e9
"""Bytes a second between two hosts where nothing else is said: one 400 Gbit/s port a host."""
HOST_MEMORY_BANDWIDTH = 200e9
"""Bytes a second that the CPUs of one host read and write: eight channels of DDR4-3200 give 205 GB/s."""
NVME_BANDWIDTH = 5e9
"""Bytes a second of one host's NVMe disk: PCIe 4.0 with 4 lanes gives 7.9 GB/s, a data-centre disk about 5 written."""


@dataclass(frozen=True, slots=True)
class Machines:
    """A homogeneous set of hosts.

    Attributes:
        num_hosts, devices_per_host: one rank runs on each device.
        device_name: as in ``dsft.metrics.peaks`` (``H100``), or ``CPU``.
        device_bytes: memory of a device. On a CPU host the ranks share the host's memory, and this is a rank's share.
        host_bytes: memory of a host; None where it was not said.
        network_bandwidth: bytes a second out of one host.
    """

    num_hosts: int
    devices_per_host: int
    device_name: str
    device_bytes: int
    host_bytes: int | None = None
    network_bandwidth: float = NETWORK_BANDWIDTH

    @property
    def num_ranks(self) -> int:
        """Devices in all."""
        return self.num_hosts * self.devices_per_host

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``, as DeepSpeed's configuration needs it."""
        return "cpu" if self.device_name == "CPU" else "cuda"

    @property
    def collective_bandwidth(self) -> float:
        """Bytes a second that each rank can send in a ring over all ranks: the slowest link that it shares."""
        inside = PCIE_BANDWIDTH
        for name, bandwidth in _PAIR_BANDWIDTH.items():
            if name in self.device_name.split():
                inside = bandwidth
                break
        return inside if self.num_hosts == 1 else min(inside, self.network_bandwidth)


def parse_size(text: str, what: str) -> int:
    """Bytes of ``80GB``, ``1.5TB`` (powers of 1000).

    Raises:
        ConfigError: it is not such a size; ``what`` names the option.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not Decimal(match["number"]):
        raise ConfigError(f"{what}: {text!r} is not an amount of memory; write for example 80GB or 1.5TB.")
    return int(Decimal(match["number"]) * _UNIT_BYTES[match["unit"].upper()])


def parse_device(text: str, what: str) -> tuple[str, int]:
    """Name and memory of ``H100-80GB``.

    Raises:
        ConfigError: it does not parse; ``what`` names the option.
    """
    match = _DEVICE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{what}: {text!r} is not a device with its memory; write for example H100-80GB or CPU-64GB.")
    name = match["name"].upper() if match["name"].lower() == "cpu" else match["name"]
    return name, parse_size(match["size"], what)


def parse_hosts(text: str) -> Machines:
    """Machines from ``4x8xH100-80GB``: hosts, devices a host, device and its memory.

    Raises:
        ConfigError: it does not parse.
    """
    match = _HOSTS.fullmatch(text.strip())
    if match is None or not int(match["hosts"]) or not int(match["devices"]):
        raise ConfigError(
            f"--hosts: {text!r} is not HOSTSxDEVICESxDEVICE; write for example 4x8xH100-80GB (four hosts of eight "
            "H100 with 80 GB each) or 1x2xCPU-12GB."
        )
    name, device_bytes = parse_device(match["device"], "--hosts")
    return _with_host_memory(Machines(int(match["hosts"]), int(match["devices"]), name, device_bytes))


def machines_of_hostfile(path: str | Path, device: str) -> Machines:
    """Machines of a hostfile, each slot a device like ``H100-80GB`` (a hostfile does not say what the devices are).

    Raises:
        ConfigError: the file cannot be read, or its hosts have different numbers of slots.
    """
    hosts = parse_hostfile(path)
    slots = {host.slots for host in hosts}
    if len(slots) > 1:
        raise ConfigError(
            f"{path}: its hosts have {', '.join(map(str, sorted(slots)))} slots; an estimate needs equal hosts. Give "
            "--hosts for the smallest kind."
        )
    name, device_bytes = parse_device(device, "--device")
    return _with_host_memory(Machines(len(hosts), slots.pop(), name, device_bytes))


def this_machine() -> Machines:
    """The devices of this machine; without any, one rank on its CPUs."""
    import psutil
    import torch

    memory = int(psutil.virtual_memory().total)
    if not torch.cuda.is_available():
        return Machines(1, 1, "CPU", memory, memory)
    properties = torch.cuda.get_device_properties(0)
    return Machines(1, torch.cuda.device_count(), properties.name, int(properties.total_memory), memory)


def _with_host_memory(machines: Machines) -> Machines:
    """A CPU host's memory is what its ranks have; of other hosts nothing is known."""
    if machines.device_type == "cuda":
        return machines
    return replace(machines, host_bytes=machines.device_bytes * machines.devices_per_host)

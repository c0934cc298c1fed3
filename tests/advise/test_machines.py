"""Machines from strings and hostfiles; what does not parse is an error that shows what would."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsft.advise.machines import Machines, machines_of_hostfile, parse_hosts, parse_size, this_machine
from dsft.errors import ConfigError


def test_hosts_devices_and_memory() -> None:
    machines = parse_hosts("4x8xH100-80GB")
    assert machines == Machines(4, 8, "H100", 80 * 10**9)
    assert (machines.num_ranks, machines.device_type) == (32, "cuda")
    assert parse_hosts("1x2xA100 SXM-0.04TB") == Machines(1, 2, "A100 SXM", 40 * 10**9)
    on_cpu = parse_hosts("2x4xcpu-16GB")
    assert (on_cpu.device_type, on_cpu.host_bytes) == ("cpu", 64 * 10**9)


@pytest.mark.parametrize(
    "text", ["", "8xH100-80GB", "4x8xH100", "0x8xH100-80GB", "4x8xH100-80", "4x8xH-0GB", "4 x 8 x H-80GB", "ax8xH-1GB"]
)  # fmt: skip
def test_what_does_not_parse_is_shown_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write for example"):
        parse_hosts(text)


def test_sizes() -> None:
    assert parse_size("1.5TB", "--host-memory") == 1_500_000_000_000
    with pytest.raises(ConfigError, match=r"--host-memory: '80 gibibytes' is not"):
        parse_size("80 gibibytes", "--host-memory")


def test_a_hostfile_of_equal_hosts(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text("a slots=8\nb slots=8\n")
    assert machines_of_hostfile(path, "H100-80GB") == Machines(2, 8, "H100", 80 * 10**9)
    path.write_text("a slots=8\nb slots=4\n")
    with pytest.raises(ConfigError, match="4, 8 slots"):
        machines_of_hostfile(path, "H100-80GB")


def test_the_slowest_shared_link_counts() -> None:
    assert parse_hosts("1x8xH100-80GB").collective_bandwidth == 450e9
    assert parse_hosts("4x8xH100-80GB").collective_bandwidth == 50e9
    assert parse_hosts("1x8xL40S-48GB").collective_bandwidth == 25e9


def test_here_is_somewhere() -> None:
    assert this_machine().num_ranks >= 1

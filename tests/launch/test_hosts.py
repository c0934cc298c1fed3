"""Hosts that do not answer, asked with the real ssh."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsft.config.hostfile import Host, parse_hostfile
from dsft.errors import LaunchError
from dsft.launch.checks import Wanted
from dsft.launch.hosts import write_hostfile
from dsft.launch.preflight import place
from tests.support.launch import need

HOSTS = (Host("nowhere-1.invalid", 2), Host("nowhere-2.invalid", 4))


def test_hosts_that_do_not_answer_are_named_with_what_to_do() -> None:
    need("ssh", "pdsh")
    with pytest.raises(LaunchError, match="only 0 of 2 hosts answer, and --min-nodes asks for 1: nowhere-1"):
        place(HOSTS, Wanted(), min_nodes=1, master_addr=None)
    with pytest.raises(LaunchError, match=r"nowhere-1.invalid: no such host is known here. Correct the name in the"):
        place(HOSTS, Wanted(), min_nodes=None, master_addr=None)


def test_the_hosts_of_a_start_are_written_for_deepspeed(tmp_path: Path) -> None:
    assert parse_hostfile(write_hostfile(tmp_path / "hosts.txt", HOSTS)) == HOSTS

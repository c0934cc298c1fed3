"""Hosts that do not answer, asked with the real ssh."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsft.config.hostfile import Host, parse_hostfile
from dsft.errors import LaunchError
from dsft.launch.hosts import reachable, write_hostfile
from dsft.launch.supervise import Job, usable_hosts
from tests.support.launch import need

HOSTS = (Host("nowhere-1.invalid", 2), Host("nowhere-2.invalid", 4))


def test_hosts_that_do_not_answer_are_left_out_down_to_the_number_that_was_asked_for(tmp_path: Path) -> None:
    need("ssh")
    assert reachable(HOSTS) == ()
    job = Job(tmp_path, ("train", "run.yaml"), hosts=HOSTS, min_nodes=1)
    with pytest.raises(LaunchError, match="only 0 of 2 hosts answer over ssh, and --min-nodes asks for 1: nowhere-1"):
        usable_hosts(job)
    assert usable_hosts(Job(tmp_path, (), hosts=HOSTS)) == HOSTS, "without --min-nodes nobody is asked"


def test_the_hosts_of_a_start_are_written_for_deepspeed(tmp_path: Path) -> None:
    assert parse_hostfile(write_hostfile(tmp_path / "hosts.txt", HOSTS)) == HOSTS

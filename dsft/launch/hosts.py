"""Other hosts, over the ssh that ``deepspeed`` itself needs: which answer, and ending what is left there."""

from __future__ import annotations

import logging
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dsft.config.hostfile import Host
from dsft.fsio import write_bytes
from dsft.launch.heartbeat import Beat

logger = logging.getLogger(__name__)

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_LIMIT_SECONDS = 20.0


def reachable(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """Those of ``hosts`` on which ssh runs a command, in their order. All are asked at the same time."""
    asked = [
        (host, subprocess.Popen([*_SSH, host.name, "true"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for host in hosts
    ]
    return tuple(host for host, process in asked if _ended_well(process))


def write_hostfile(path: Path, hosts: Sequence[Host]) -> Path:
    """Write the hosts of a start for ``deepspeed --hostfile``."""
    write_bytes(path, "".join(f"{host.name} slots={host.slots}\n" for host in hosts).encode())
    return path


def kill_remote(beats: Sequence[Beat]) -> None:
    """Kill the ranks of these heartbeats on their hosts; a process that is no dsft any more is left alone."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for beat in beats:
        by_host[beat.host].append(beat.pid)
    asked = []
    for host, pids in by_host.items():
        script = f"for p in {' '.join(map(str, pids))}; do grep -qa dsft /proc/$p/cmdline && kill -9 $p; done; true"
        command = [*_SSH, host, script]
        asked.append((host, subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)))
    for host, process in asked:
        if not _ended_well(process):
            logger.warning("%s does not answer over ssh, so ranks may be left there", host)


def _ended_well(process: subprocess.Popen[bytes]) -> bool:
    try:
        return process.wait(_LIMIT_SECONDS) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False

"""Other hosts, over the ssh that ``deepspeed`` itself needs: running one command on all, and ending ranks there."""

from __future__ import annotations

import logging
import shlex
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsft.config.hostfile import Host
from dsft.fsio import write_bytes
from dsft.launch.heartbeat import Beat

logger = logging.getLogger(__name__)

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5")
LIMIT_SECONDS = 18.0
_MORE_SECONDS = 0.3
"""For each further command: what an ssh client takes of a processor here, and a login host may have few of them."""
SSH_FAILED = 255
"""Exit code of ssh where it did not get as far as the command (ssh(1))."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said.

    Attributes:
        code: its exit code; ``SSH_FAILED``: ssh did not reach the host; None: no answer in time.
        sent, received: when, by this host's clock.
    """

    code: int | None
    output: str
    errors: str
    sent: float
    received: float


def ask_all(commands: Sequence[Sequence[str]], text: str = "", limit_seconds: float = LIMIT_SECONDS) -> list[Answer]:
    """Run commands at the same time, each with ``text`` on its standard input; their answers, in their order.

    Args:
        limit_seconds: for one alone; many together get more.
    """
    answers: list[Answer | None] = [None] * len(commands)
    limit_seconds += _MORE_SECONDS * (len(commands) - 1)
    sent = time.time()

    def ask(number: int) -> None:
        code: int | None = SSH_FAILED
        output = errors = ""
        try:
            done = subprocess.run(
                commands[number], input=text, capture_output=True, text=True, timeout=limit_seconds, check=False
            )
            code, output, errors = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            code = None
        except OSError as error:
            errors = f"{commands[number][0]}: {error.strerror}"
        answers[number] = Answer(code, output, errors, sent, time.time())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(commands))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for answer in answers if answer is not None]


def over_ssh(host: str, words: Sequence[str]) -> list[str]:
    """The command that runs ``words`` on a host."""
    return [*SSH, host, shlex.join(words)]


def write_hostfile(path: Path, hosts: Sequence[Host]) -> Path:
    """Write the hosts of a start for ``deepspeed --hostfile``."""
    write_bytes(path, "".join(f"{host.name} slots={host.slots}\n" for host in hosts).encode())
    return path


def kill_remote(beats: Sequence[Beat], names: Mapping[str, str]) -> None:
    """Kill the ranks of these heartbeats on their hosts; a process that is no dsft any more is left alone.

    Args:
        names: what ssh knows the hosts by, for each one's own name.
    """
    by_host: dict[str, list[int]] = defaultdict(list)
    for beat in beats:
        by_host[names.get(beat.host, beat.host)].append(beat.pid)
    scripts = {
        host: f"for p in {' '.join(map(str, pids))}; do grep -qa dsft /proc/$p/cmdline && kill -9 $p; done; true"
        for host, pids in by_host.items()
    }
    answers = ask_all([over_ssh(host, ["sh", "-c", script]) for host, script in scripts.items()])
    for host, answer in zip(scripts, answers, strict=True):
        if answer.code != 0:
            logger.warning(
                "%s does not answer over ssh; what is left there ends when it sees that it is replaced", host
            )

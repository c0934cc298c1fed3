"""Hosts on this machine: each has its own network, processes, host name, /dev/shm and sshd; /tmp is what they share.

A host is one process that every other process of it hangs from. Killing it ends them all and takes its network away, so
that nothing is left, whatever happens: it also dies with the process that runs the tests. The switch between the hosts
is a bridge in a network of its own; this machine's network and its folder ~/.ssh are never touched.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.launch import need

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh", "ip", "tc", "unshare", "nsenter", "setpriv")
INTERFACE = "eth0"
_TIED = ("setpriv", "--pdeathsig", "KILL")
_START_SECONDS = 20.0
_SSH_CONFIG = """\
Host *
  IdentityFile /etc/ssh/key
  GlobalKnownHostsFile /etc/ssh/known_hosts
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  LogLevel ERROR
"""
_SSHD_CONFIG = """\
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
UseDNS no
StrictModes no
PidFile none
MaxStartups 100
"""
_INIT = """\
set -e
hostname {name}
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {etc} /etc/ssh
mount --bind {etc}/hosts /etc/hosts
[ ! -d ~/.ssh ] || mount -t tmpfs tmpfs ~/.ssh
ip link set lo up
{extra}
$(command -v sshd) -D -E {folder}/{name}.sshd.log &
touch {folder}/{name}.ready
while :; do wait; sleep 1; done
"""


@dataclass
class Host:
    """One host.

    Attributes:
        pid: the process that everything of the host hangs from.
        process: what holds it, on this machine.
    """

    name: str
    address: str
    pid: int
    process: subprocess.Popen[bytes]

    def command(self, words: Sequence[str], folder: Path) -> list[str]:
        """``words``, to be run on this host in ``folder``."""
        inside = ["sh", "-c", f'cd {shlex.quote(str(folder))} && exec "$@"', "sh", *words]
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", *inside]

    def ask(self, *words: str, folder: Path = Path("/"), environ: Mapping[str, str] | None = None) -> str:
        """What a short command says there."""
        command = self.command(words, folder)
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **(environ or {})}
        )
        assert answer.returncode == 0, (words, answer.stdout, answer.stderr)
        return answer.stdout

    def die(self) -> None:
        """The power fails."""
        psutil.Process(self.pid).kill()
        self.process.wait()


@dataclass
class Network:
    """Hosts on one switch, by name."""

    switch: int
    hosts: dict[str, Host]

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def set_link(self, name: str, state: str) -> None:
        """Cut a host's cable (``down``), or mend it (``up``)."""
        _in_network(self.switch, "ip", "link", "set", name, state)

    def slow_down(self, name: str, megabits: int) -> None:
        """Let no more than so many Mbit/s go to a host and come from it."""
        for pid, link in ((self.switch, name), (self[name].pid, INTERFACE)):
            shape = ("rate", f"{megabits}mbit", "burst", "128kb", "latency", "400ms")
            _in_network(pid, "tc", "qdisc", "add", "dev", link, "root", "tbf", *shape)


@contextmanager
def network(folder: Path, names: Sequence[str], extra: Mapping[str, str] | None = None) -> Iterator[Network]:
    """Start hosts that reach each other over ssh under their names.

    Args:
        folder: for their files; on a file system that all of them see.
        extra: by host, shell lines that make it different: what it mounts, or how its sshd is set up.
    """
    need(*PROGRAMS)
    _need_namespaces()
    for kind in ("key", "other_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / kind)], check=True)
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
    with ExitStack() as stack:
        switch = stack.enter_context(_held([*_TIED, "unshare", "--net", "sleep", "infinity"]))
        _wait_for(lambda: _net_of(switch.pid) != _net_of(os.getpid()), "the switch")
        _in_network(switch.pid, "ip", "link", "add", "switch", "type", "bridge")
        _in_network(switch.pid, "ip", "link", "set", "switch", "up")
        hosts = {}
        for name, address in addresses.items():
            process = stack.enter_context(_held(_host_command(folder, name, addresses, (extra or {}).get(name, ""))))
            _wait_for((folder / f"{name}.ready").exists, name)
            (init,) = psutil.Process(process.pid).children()
            _connect(switch.pid, init.pid, name, address)
            hosts[name] = Host(name, address, init.pid, process)
        yield Network(switch.pid, hosts)


def _host_command(folder: Path, name: str, addresses: Mapping[str, str], extra: str) -> list[str]:
    etc = folder / f"{name}.etc"
    etc.mkdir()
    key = (folder / "key").read_text()
    public = (folder / "key.pub").read_text()
    (etc / "ssh_config").write_text(_SSH_CONFIG)
    (etc / "sshd_config").write_text(_SSHD_CONFIG)
    (etc / "authorized_keys").write_text(public)
    (etc / "known_hosts").write_text("".join(f"{one} {public}" for one in addresses))
    (etc / "key").write_text(key)
    (etc / "key").chmod(0o600)
    # A host's own name is a loopback address to itself, as the installers of Debian and Ubuntu set it up.
    known = {**addresses, name: "127.0.1.1", "localhost": "127.0.0.1"}
    (etc / "hosts").write_text("".join(f"{address} {one}\n" for one, address in known.items()))
    script = folder / f"{name}.sh"
    script.write_text(_INIT.format(name=name, etc=etc, folder=folder, extra=extra))
    spaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
    return [*_TIED, "unshare", *spaces, "bash", str(script)]


def _connect(switch: int, host: int, name: str, address: str) -> None:
    _in_network(switch, *f"ip link add name {name} type veth peer name {INTERFACE} netns {host}".split())
    _in_network(switch, *f"ip link set {name} master switch up".split())
    _in_network(host, *f"ip address add {address}/24 dev {INTERFACE}".split())
    _in_network(host, *f"ip link set {INTERFACE} up".split())


def _in_network(pid: int, *words: str) -> None:
    answer = subprocess.run(["nsenter", "-t", str(pid), "-n", *words], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, (words, answer.stderr)


def _net_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _wait_for(true: object, what: str) -> None:
    assert callable(true)
    deadline = time.monotonic() + _START_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"{what} does not come up"
        time.sleep(0.02)


@contextmanager
def _held(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _need_namespaces() -> None:
    """Skip where the kernel or the container allows none, in CI too: no installation could change that."""
    answer = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        pytest.skip(f"namespaces are not allowed here: {answer.stderr.strip()}")

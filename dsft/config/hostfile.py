"""Hostfiles: one host a line with its number of ranks, as the ``deepspeed`` launcher reads them.

node-a slots=8
node-b slots=8   # comments and blank lines are skipped
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dsft.errors import ConfigError

_LINE = re.compile(r"^(?P<name>\S+)\s+slots=(?P<slots>\d+)$")


@dataclass(frozen=True, slots=True)
class Host:
    """One host and the number of ranks it runs (its accelerators, or its sockets on CPU hosts)."""

    name: str
    slots: int


def parse_hostfile(path: str | Path) -> tuple[Host, ...]:
    """The hosts of a hostfile, in its order (the first one holds rank 0).

    Raises:
        ConfigError: the file is missing, names no host, repeats one, or has a line that is not ``name slots=N``. (The
            launcher trains on one host in silence where its hostfile does not exist.)
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the hostfile {path} (looked from {Path.cwd()}): {error}. See hostfiles/ for examples."
        ) from error
    first_line: dict[str, int] = {}
    hosts = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].strip()
        if not content:
            continue
        match = _LINE.match(content)
        if match is None:
            raise ConfigError(f"{path}, line {number}: expected 'hostname slots=N', found {content!r}.")
        host = Host(match["name"], int(match["slots"]))
        if host.slots == 0:
            raise ConfigError(f"{path}, line {number}: {host.name} has slots=0; leave the host out instead.")
        if host.name in first_line:
            raise ConfigError(
                f"{path}, line {number}: {host.name} is listed twice, first on line {first_line[host.name]}; "
                "give it one line with all its slots."
            )
        first_line[host.name] = number
        hosts.append(host)
    if not hosts:
        raise ConfigError(f"{path} names no host; it needs lines such as 'node-a slots=8'.")
    return tuple(hosts)

"""The launcher above this rank. A rank whose launcher is gone must not train on as an orphan.

``deepspeed`` that gets SIGTERM or SIGKILL leaves its ranks running, and nothing tells them. So each rank looks up the
chain of its ancestors once, as early as it can, and then watches those that belong to a launcher.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

_PROGRAMS = frozenset(
    ("deepspeed", "torchrun", "mpirun", "mpiexec", "orterun", "prterun", "orted", "prted", "hydra_pmi_proxy")
) | {"mpiexec.hydra", "hydra_bstrap_proxy", "srun", "slurmstepd"}
_MODULES = (
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
)
_NODE_LAUNCHER = "deepspeed.launcher.launch"
_SHELLS = frozenset(("sh", "bash", "dash", "zsh", "ksh"))


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A process above this one.

    Attributes:
        process: to ask whether it lives (psutil knows it by its id and start time).
        command: its arguments.
    """

    process: psutil.Process
    command: tuple[str, ...]


class Launcher:
    """The ancestors of this process that belong to its launcher: those up to the topmost that is one.

    Args:
        ancestors: from the parent up.
        is_deepspeed: the environment says that DeepSpeed's node launcher started this process.
    """

    def __init__(self, ancestors: list[Ancestor], *, is_deepspeed: bool = False) -> None:
        names = [launcher_name(one.command) for one in ancestors]
        top = max((number for number, name in enumerate(names) if name is not None), default=-1)
        if top >= 0 and names[top] == _NODE_LAUNCHER:  # the runner is on another host, behind a remote shell
            top += _remote_shell(ancestors[top + 1 :])
        self._chain = [(one.process, name or one.command[0]) for one, name in zip(ancestors, names, strict=True)]
        self._chain = self._chain[: top + 1]
        if top < 0:
            self._orphaned_early = is_deepspeed and bool(ancestors) and ancestors[0].process.pid == 1
        else:
            self._orphaned_early = names[top] == _NODE_LAUNCHER and _adopted(ancestors[top].process)

    @classmethod
    def find(cls) -> Launcher:
        """Look at the ancestors of this process. Call it before slow imports: a launcher may die during them."""
        ancestors = []
        for process in psutil.Process().parents():
            try:
                ancestors.append(Ancestor(process, tuple(process.cmdline()) or (process.name(),)))
            except psutil.Error:  # gone between the listing and the question, or another user's: not our launcher
                break
        return cls(ancestors, is_deepspeed="CROSS_RANK" in os.environ)

    def lost(self) -> str | None:
        """Who of the launcher's processes is gone, for a person; None: all live, or there is none."""
        for process, name in self._chain:
            if not _lives(process):
                return f"{name} (process {process.pid})"
        return "deepspeed (it had ended before this rank started)" if self._orphaned_early else None


def launcher_name(command: tuple[str, ...]) -> str | None:
    """The launcher that a process with these arguments is; None for any other program.

    Looks at the program itself, or at the script or module that a Python runs; never at further arguments, so that a
    shell or an editor that was given a launcher's command line is none.
    """
    words = list(command)
    program = os.path.basename(words[0])
    if program.startswith("python"):
        while len(words) > 1 and words[1].startswith("-") and words[1] not in ("-m", "-c"):
            del words[1]
        if len(words) > 2 and words[1] == "-m":
            if words[2] in _MODULES:
                return words[2]
            return "dsft launch" if words[2] == "dsft" and "launch" in words[3:4] else None
        words = words[1:]
        program = os.path.basename(words[0]) if words else ""
    if program == "dsft" and words[1:2] == ["launch"]:
        return "dsft launch"
    program = program.removesuffix(":")
    return program if program in _PROGRAMS else None


def _remote_shell(above: list[Ancestor]) -> int:
    """How many ancestors over a node launcher are its ssh connection: a shell that runs one command, and sshd."""
    number = 0
    while number < len(above) and _runs_one_command(above[number].command):
        number += 1
    is_ssh = number < len(above) and os.path.basename(above[number].command[0]).startswith("sshd")
    return number + 1 if is_ssh else 0


def _runs_one_command(command: tuple[str, ...]) -> bool:
    return os.path.basename(command[0]) in _SHELLS and "-c" in command[1:]


def _adopted(process: psutil.Process) -> bool:
    try:
        return bool(process.ppid() == 1)
    except psutil.Error:
        return True


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False

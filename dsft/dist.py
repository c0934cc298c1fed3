"""The only user of torch.distributed: starts the process group and offers the few collectives that dsft needs.

Everything here runs on a gloo group over the CPU (the control group), so that no device is waited for. Objects travel
as JSON and floats as the bits of an int64, never as pickles. The model's own collectives are DeepSpeed's.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

import dsft.errors
from dsft.address import choose_interface, with_address
from dsft.errors import DsftError, LaunchError, RankLostError, TrainingError
from dsft.world import World, check_world_size, discover_world

if TYPE_CHECKING:
    import torch
    import torch.distributed

__all__ = ["Groups", "PendingControl", "World", "check_world_size", "discover_world", "from_bits", "init", "to_bits"]

logger = logging.getLogger(__name__)

DeviceType = Literal["cpu", "cuda"]
SAY_AFTER_SECONDS = 2.0
"""Others that are on their way are met sooner; then the error is said once, by who raises it."""
CONTROL_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others. Longer than any phase in which ranks work alone (they poll there instead)."""

SOCKETS_PER_RANK = 4
"""At most, for each other rank: the default group, the control group, that of a saving thread, rank 0's store (3.03
counted on rank 0 of 64 with two groups)."""
OTHER_OPEN_FILES = 1000
"""Token shards, files of a checkpoint, logs, libraries."""


def to_bits(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The bits of float64[k] as int64[k], so that floats can travel beside integers in one control vector."""
    return np.ascontiguousarray(values, dtype=np.float64).view(np.int64)


def from_bits(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Inverse of :func:`to_bits`, any shape."""
    return np.ascontiguousarray(bits, dtype=np.int64).view(np.float64)


@dataclass(frozen=True, slots=True)
class PendingControl:
    """An all-gather that is on its way."""

    work: torch.distributed.Work
    parts: list[torch.Tensor]

    def wait(self) -> npt.NDArray[np.int64]:
        """Wait for every rank's vector: int64[R, k], row r is rank r's. Raises TrainingError when a rank is gone."""
        _wait(self.work)
        return np.stack([part.numpy() for part in self.parts])


class Groups:
    """The control group of a started run. Every method is collective unless it says otherwise.

    Attributes:
        world: who this rank is.
        device: torch device of this rank's model ("cpu" or "cuda:<index>").
    """

    def __init__(self, world: World, device: torch.device, control: torch.distributed.ProcessGroup) -> None:
        self.world = world
        self.device = device
        self._control = control

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.world.size

    def post(self, vector: npt.NDArray[np.int64]) -> PendingControl:
        """Begin an all-gather of int64[k] (k alike on every rank) and return at once."""
        import torch

        assert vector.dtype == np.int64, vector.dtype
        assert vector.ndim == 1, vector.shape
        return self._post(torch.from_numpy(vector.copy()))

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum float64[k] over ranks, added in rank order, so that every rank gets the same bits."""
        parts = from_bits(self.post(to_bits(values)).wait())
        total: npt.NDArray[np.float64] = parts[0].copy()
        for part in parts[1:]:
            total += part
        return total

    def all_gather_object(self, value: Any) -> list[Any]:
        """Everyone's JSON value, by rank. Tuples come back as lists."""
        import torch

        data = np.frombuffer(json.dumps(value).encode(), dtype=np.int8)
        lengths = self.post(np.array([data.size], dtype=np.int64)).wait()[:, 0]
        padded = torch.zeros(int(lengths.max()), dtype=torch.int8)
        padded[: data.size] = torch.from_numpy(data.copy())
        pending = self._post(padded)
        _wait(pending.work)
        return [
            json.loads(part.numpy()[:length].tobytes()) for part, length in zip(pending.parts, lengths, strict=True)
        ]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank; what the others pass is not looked at."""
        return self.all_gather_object(value if self.rank == 0 else None)[0]

    def agree(self, error: Exception | None) -> None:
        """Fail together: if any rank brings an error, every rank raises the first one, with that rank's name in it.

        For work that ranks do alone and that may fail on one of them: catch, then call this on every rank. An error
        that is no DsftError is raised as it is, with its traceback, where it happened; elsewhere as a TrainingError.
        """
        mine = None
        if isinstance(error, DsftError):
            mine = {"kind": type(error).__name__, "text": str(error), "host": socket.gethostname()}
        elif error is not None:
            text = f"another rank failed, and its own output has the traceback: {type(error).__name__}: {error}"
            mine = {"kind": TrainingError.__name__, "text": text, "host": socket.gethostname()}
        with _said_while_waiting(error):
            everyones = self.all_gather_object(mine)
        if error is not None and not isinstance(error, DsftError):
            raise error
        for rank, theirs in enumerate(everyones):
            if theirs is not None:
                where = f" (rank {rank} on {theirs['host']})" if self.size > 1 else ""
                kind: type[DsftError] = getattr(dsft.errors, theirs["kind"])
                raise kind(theirs["text"] + where) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work without collectives that one rank or each rank does alone: what fails on one fails on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  (whatever it is, no rank may wait for one that is gone)
            error = caught
        self.agree(error)

    def channel(self) -> Channel:
        """A way for one thread of each rank to send to others while all this goes on."""
        return Channel(_new_group())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.post(np.zeros(1, dtype=np.int64)).wait()

    def close(self) -> None:
        """Leave the process group. Only on the clean path: after a failure the process just ends."""
        import torch.distributed as torch_dist

        self.barrier()  # a rank that leaves early would look dead to one that still reads its last message
        torch_dist.destroy_process_group()

    def _post(self, tensor: torch.Tensor) -> PendingControl:
        import torch
        import torch.distributed as torch_dist

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            work = torch_dist.all_gather(parts, tensor, group=self._control, async_op=True)
        except RuntimeError as error:
            raise _rank_lost(error) from error
        assert work is not None
        return PendingControl(work, parts)


class Channel:
    """A gloo group beside the control group, so that what a thread sends cannot meet another thread's messages.

    Not collective: a rank sends when the rank it names receives. One thread of a rank uses it at a time.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group

    def exchange(
        self, sent: tuple[int, npt.NDArray[np.uint8]] | None, received: tuple[int, npt.NDArray[np.uint8]] | None
    ) -> None:
        """Send to one rank and receive from one, both at once (rank and uint8[n], n alike on both sides; or None).

        Raises:
            RankLostError: one of them is gone.
        """
        import torch
        import torch.distributed as torch_dist

        try:
            works = [
                start(torch.from_numpy(message[1]), message[0], group=self._group)
                for start, message in ((torch_dist.isend, sent), (torch_dist.irecv, received))
                if message is not None
            ]
        except RuntimeError as error:
            raise _rank_lost(error) from error
        for work in works:
            assert work is not None
            _wait(work)


@contextmanager
def _said_while_waiting(error: Exception | None) -> Iterator[None]:
    """Say this rank's error already while it waits for the others, of which one may hang or be at work for long."""
    if error is None:
        yield
        return
    message = "%s: %s. This rank waits for the others to hear of it."
    timer = threading.Timer(SAY_AFTER_SECONDS, logger.error, (message, type(error).__name__, str(error).rstrip(".")))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wait(work: torch.distributed.Work) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise _rank_lost(error) from error


def _rank_lost(error: RuntimeError) -> RankLostError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RankLostError(
        f"another rank is gone or did not answer ({reason}). Its own output, above this line or in its log, says why; "
        "this rank cannot go on without it."
    )


def init(world: World, device_type: DeviceType) -> Groups:
    """Start the process group through DeepSpeed (gloo on the CPU, NCCL on CUDA) and a gloo control group beside it.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, so that no library
    guesses for itself.

    Raises:
        LaunchError: no address could be found, no such device, too few open files are allowed, or the ranks do not
            find each other.
    """
    world = with_address(world)
    export_world(world, device_type)
    allow_sockets(world)
    if world.local_size < world.size:
        choose_interface(world)
    import torch

    if device_type == "cuda":
        device = torch.device("cuda", _cuda_index(world))
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the device's number
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    deepspeed = importlib.import_module("deepspeed")
    try:
        with without_prints():
            deepspeed.init_distributed(
                dist_backend="nccl" if device_type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
            )
        groups = control_group(world, device)
        groups.barrier()  # every rank has mapped the others' buffers
        drop_shared_memory_name(world)
        return groups
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {world.rank} of {world.size} on {socket.gethostname()} could not join the others at "
            f"{world.master_addr}:{world.master_port}: {str(error).strip().splitlines()[0]}. Check that the host is "
            "reachable from every node, that no other run uses the port (set MASTER_PORT), and, with several network "
            "cards, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        ) from error


def allow_sockets(world: World) -> None:
    """Raise this process's limit of open files to what the run's connections take, if that is allowed.

    A gloo group may connect each rank to every other one. A shell usually begins with a limit of 1,024: at some hundred
    ranks the start would end with "Too many open files".

    Raises:
        LaunchError: more is needed than the host allows.
    """
    needed = OTHER_OPEN_FILES + SOCKETS_PER_RANK * world.size
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise LaunchError(
                f"{socket.gethostname()} lets a process open {hard:,} files, and rank {world.rank} of {world.size:,} "
                f"needs up to {needed:,} for its connections. Raise the limit there (`ulimit -Hn`, LimitNOFILE= of "
                "slurmd or sshd, or /etc/security/limits.conf)."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextmanager
def without_prints() -> Iterator[None]:
    """Around calls in which DeepSpeed tells of its progress with print; its errors are exceptions or go to stderr."""
    with redirect_stdout(io.StringIO()):
        yield


def drop_shared_memory_name(world: World) -> None:
    """Give this rank's buffer of DeepSpeed's CPU collectives back when the last process that maps it ends.

    DeepSpeed 0.19.8 never unlinks it: each run would leave 66 MiB a rank in /dev/shm until the next boot (307 of them
    filled 20 GB here within two hours), and a later run with the same port would open the stale one. Call it when every
    rank of the host has started; the mapping stays.
    """
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{world.master_addr}_{world.master_port}_{world.rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def control_group(world: World, device: torch.device) -> Groups:
    """Make the gloo control group on top of a process group that is started already."""
    import torch.distributed as torch_dist

    actual = (torch_dist.get_rank(), torch_dist.get_world_size())
    if actual != (world.rank, world.size):
        raise LaunchError(
            f"the process group says rank {actual[0]} of {actual[1]}, the launcher said rank {world.rank} of "
            f"{world.size}. Start the run through one launcher only."
        )
    return Groups(world, device, _new_group())


def _new_group() -> torch.distributed.ProcessGroup:
    import torch.distributed as torch_dist

    group: torch.distributed.ProcessGroup | None = torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    assert group is not None
    return group


def export_world(world: World, device_type: DeviceType) -> None:
    """Write the world into ``os.environ`` for DeepSpeed and torch. Not collective.

    Raises:
        LaunchError: DS_ACCELERATOR names another device than the run uses.
    """
    assert world.master_addr is not None
    assert world.master_port is not None
    accelerator = os.environ.setdefault("DS_ACCELERATOR", device_type)
    if accelerator != device_type:
        raise LaunchError(
            f"DS_ACCELERATOR={accelerator} is set, but this run uses {device_type}. Unset it, or choose that device."
        )
    # Without it each rank reads the address of every other one from rank 0: 1.8 s of rank 0's processor at 128 ranks,
    # growing with their square (benchmarks/cluster_startup.py), so half an hour at thousands. With it: 0.2 s.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_SIZE=str(world.local_size),
        LOCAL_WORLD_SIZE=str(world.local_size),
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(world.master_port),
    )


def _cuda_index(world: World) -> int:
    import torch

    count = torch.cuda.device_count()
    if count == 1:
        return 0  # srun --gpus-per-task=1 shows each rank only its own device
    if world.local_rank >= count:
        raise LaunchError(
            f"rank {world.rank} is number {world.local_rank} on {socket.gethostname()}, which shows {count} CUDA "
            "devices. Start at most one rank per device, or check CUDA_VISIBLE_DEVICES."
        )
    return world.local_rank

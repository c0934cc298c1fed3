"""Runs a function on N ranks of a real gloo process group, in new processes that are ready at once.

    results = run_ranks(function, 2, "argument", timeout_seconds=60)     # [function(groups, "argument") of each rank]

``function`` must be importable (top level of its module) and gets a ``dsft.dist.Groups`` first. Each process is told
its place by the usual variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT), so DeepSpeed can
be initialised inside. An exception on a rank is raised here, from its traceback; a rank that hangs is killed by its id.

Processes are forks of one that has only imported (multiprocessing's forkserver): importing torch, transformers and
DeepSpeed takes seven seconds of a core, more than most tests that need it. None is used twice: DeepSpeed's
shared-memory collectives keep the first rank and world size for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0
"""After one rank has failed, how long the others may take to notice before they are killed."""


_IMPORTED = (
    "dsft.train.start",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it, and with it torch's compiler
    "transformers.models.llama.modeling_llama",
)
"""What the server of forks imports once; with one OpenMP thread none of it starts a thread."""


class RankError(Exception):
    """Tracebacks of the ranks that failed, or the ranks that hung or died."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    environ: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``function(groups, *args)`` on ``num_ranks`` processes and return what each returned, by rank.

    Args:
        function: importable, so not a lambda and not nested. Arguments and results are pickled.
        timeout_seconds: hang limit; the ranks are killed by process id and RankError is raised.
        environ: variables to set in the ranks, beside those of this process. What reads one while it is imported has
            read that of the first call.

    Raises:
        Exception: what the first rank that failed raised (its cause is a RankError with all tracebacks).
        RankError: a rank hung, or died without a word (the exit code is in the text; -9 is SIGKILL).
    """
    workers = [_start() for _ in range(num_ranks)]
    port = free_port()
    for rank, worker in enumerate(workers):
        variables = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCH_GLOO_LAZY_INIT": "1",  # as dsft.dist.export_world sets it
            **(environ or {}),
        }
        worker.connection.send((_reference(function), pickle.dumps(args), variables, os.getcwd()))
    outcomes = _collect(workers, timeout_seconds)
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # DeepSpeed never gives them back
        buffer.unlink(missing_ok=True)
    _kill(workers)
    _raise_failures(outcomes)
    return [pickle.loads(outcome[1]) for outcome in outcomes]


def _start() -> _Worker:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    ours, theirs = multiprocessing.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=False)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _collect(workers: Sequence[_Worker], timeout_seconds: float) -> list[tuple[str, Any, str]]:
    """(kind, pickled value or exception, text) of each rank; kind: returned, raised, died or hung."""
    outcomes: dict[int, tuple[str, Any, str]] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(outcomes) < len(workers):
        waiting = {worker.connection: rank for rank, worker in enumerate(workers) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                outcomes[rank] = (
                    "hung",
                    None,
                    f"rank {rank} was still running when the others had failed or time was up",
                )
            _kill([workers[rank] for rank in waiting.values()])
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                outcomes[rank] = connection.recv()
            except EOFError:
                workers[rank].process.join(10)
                outcomes[rank] = ("died", None, f"rank {rank} died with exit code {workers[rank].process.exitcode}")
            if outcomes[rank][0] != "returned":
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return [outcomes[rank] for rank in range(len(workers))]


def _raise_failures(outcomes: Sequence[tuple[str, Any, str]]) -> None:
    texts = [f"--- rank {rank}: {text}" for rank, (kind, _, text) in enumerate(outcomes) if kind != "returned"]
    if not texts:
        return
    cause = RankError("\n".join(texts))
    if not any(kind == "died" for kind, _, _ in outcomes):
        for kind, data, _ in outcomes:
            if kind == "raised" and data is not None:
                raise pickle.loads(data) from cause
    raise cause


def _kill(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        if worker.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGKILL)
    for worker in workers:
        worker.process.join(10)


def _reference(function: Callable[..., Any]) -> tuple[str, str, str]:
    """(module name, file, name): the file lets a rank import a test module that no import path leads to."""
    file = inspect.getsourcefile(function)
    assert file is not None
    return function.__module__, file, function.__qualname__


def free_port() -> int:
    """A port of this host that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------------- in the rank


def _serve(connection: Connection) -> None:
    """Run the one task."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan when pytest, and so the server, is killed
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    try:
        reference, arguments, variables, folder = connection.recv()
    except (EOFError, OSError):
        return
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    try:
        value = _run(_import(reference), pickle.loads(arguments), variables)
    except BaseException as error:  # noqa: BLE001  (whatever it is, the test that waits must hear of it)
        connection.send(("raised", _pickled(error), traceback.format_exc()))
        return  # ends the process, so that ranks that wait for this one notice
    connection.send(("returned", pickle.dumps(value), ""))
    with contextlib.suppress(EOFError, OSError):
        connection.recv()  # until all have returned: rank 0 holds the store that the others may still ask


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], variables: dict[str, str]) -> Any:
    import torch
    import torch.distributed

    from dsft.dist import World, control_group

    torch.set_num_threads(1)
    rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{variables['MASTER_PORT']}", rank=rank, world_size=size
    )
    port = int(variables["MASTER_PORT"])
    groups = control_group(World(rank, size, rank, size, 0, "127.0.0.1", port, "environment"), torch.device("cpu"))
    value = function(groups, *arguments)
    groups.close()
    return value


def _import(reference: tuple[str, str, str]) -> Callable[..., Any]:
    name, file, attribute = reference
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    function = getattr(module, attribute)
    assert callable(function)
    return function  # type: ignore[no-any-return]


def _pickled(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # noqa: BLE001  (an exception may refuse to be pickled in any way; its traceback still travels)
        return None
    return data

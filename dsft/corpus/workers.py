"""Prepares with several processes of this machine. They are spawned, so nothing of this process is copied into them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

from dsft.corpus.prepare import Section, prepare_sources
from dsft.corpus.progress import PrepareProgress
from dsft.corpus.tokenizer import Tokenizer
from dsft.errors import DsftError

_JOIN_SECONDS = 10.0


def prepare_with_workers(
    make_tokenizer: Callable[[], Tokenizer],
    sources: Sequence[Section],
    store_dir: Path,
    num_workers: int,
    bad_records: Literal["error", "skip"],
    progress: Callable[[PrepareProgress], None],
) -> list[Path]:
    """As ``prepare_sources``, by ``num_workers`` processes (1: in this one).

    Args:
        make_tokenizer: called once in each process, so it must be a function that another process can import.

    Raises:
        DsftError: what the first worker to fail raised, or that a worker was killed; the others are ended.
    """
    if num_workers == 1:
        return prepare_sources(sources, make_tokenizer(), store_dir, 0, 1, bad_records, progress)
    context = multiprocessing.get_context("spawn")
    receivers: dict[Connection, int] = {}
    processes: list[SpawnProcess] = []
    try:
        for worker in range(num_workers):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, make_tokenizer, tuple(sources), store_dir, worker, num_workers, bad_records)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            sender.close()  # so that the pipe ends when the worker does
            receivers[receiver] = worker
            processes.append(process)
        return _collect(receivers, processes, progress)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_JOIN_SECONDS)


def _collect(
    receivers: dict[Connection, int], processes: Sequence[SpawnProcess], progress: Callable[[PrepareProgress], None]
) -> list[Path]:
    """Pass reports on until every worker is done."""
    folders: list[Path] = []
    while receivers:
        for receiver in wait(list(receivers)):
            assert isinstance(receiver, Connection)
            worker = receivers[receiver]
            try:
                message = receiver.recv()
            except EOFError:
                processes[worker].join(_JOIN_SECONDS)
                raise DsftError(
                    f"Worker {worker} of dsft prepare was ended with exit code {processes[worker].exitcode} (a "
                    f"negative one is a signal; -9 often means that memory ran out). What is published is kept: "
                    f"run the command again, with fewer workers if memory was short."
                ) from None
            if isinstance(message, DsftError):
                raise message
            if isinstance(message, PrepareProgress):
                progress(message)
            else:
                folders = message
                del receivers[receiver]
    return folders


def _work(sender: Connection, make_tokenizer: Callable[[], Tokenizer], *arguments: Any) -> None:
    """Body of a worker process: sends reports, then its folders or its error."""
    sources, store_dir, worker, num_workers, bad_records = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_workers)))
    try:
        folders = prepare_sources(sources, make_tokenizer(), store_dir, worker, num_workers, bad_records, sender.send)
    except DsftError as error:
        sender.send(error)
    else:
        sender.send(folders)

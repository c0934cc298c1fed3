"""Saving a checkpoint as a whole, or not at all.

All ranks write into a hidden staging folder, each in a thread; rank 0 adds the state and, last, the manifest with every
file's size and hash; then the folder gets its name by a rename. A crash at any instant leaves the older checkpoints and
at most a staging folder, which the next save removes. If anything fails on any rank, all ranks agree on it and raise
SaveError.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dsft.checkpoint.local_disk import LocalDisk
from dsft.checkpoint.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    Manifest,
    WrittenFile,
    checkpoint_name,
    manifest_to_json,
    written_file,
)
from dsft.checkpoint.retention import Keep, remove, retain, sweep
from dsft.dist import Groups
from dsft.errors import SaveError
from dsft.fsio import fsync_file, fsync_folder, hash_file, save_error, write_bytes, write_json

logger = logging.getLogger(__name__)

WritePayload = Callable[[Path], Sequence[WrittenFile]]
"""Writes this rank's files into a folder and says which they are; their data is on the disk when it returns."""

SHARED_FOLDER_SECONDS = 30.0
"""How long a network file system may take to show a new folder to the other hosts (NFS caches absent names)."""


def save(folder: Path, step: int, **arguments: Any) -> Path:
    """As :func:`begin`, and wait until it is committed. Collective."""
    return begin(folder, step, **arguments).finish()


def begin(
    folder: Path,
    step: int,
    *,
    groups: Groups,
    attempt: str,
    write_payload: WritePayload,
    payload_bytes: int,
    state: dict[str, Any],
    keep: Keep,
    disk: LocalDisk | None = None,
) -> PendingSave:
    """Begin to save checkpoint ``step`` in ``folder``, and remove what ``keep`` does not name. Collective.

    Args:
        folder: ``<run>/checkpoints``, on storage that every host sees; only the run's owner may write here.
        step: optimizer steps done.
        attempt: id of this start of the run.
        write_payload: writes this rank's part, in a thread; may raise OSError or SaveError.
        payload_bytes: what this rank will write; compared with the free space before anything is written.
        state: plain JSON, the same on every rank (rank 0's is written).
        keep: which checkpoints stay.
        disk: where the shards go instead, with a copy on the next host; None: into the checkpoint's folder.

    Raises:
        SaveError: on every rank alike, naming the first rank that failed. Older checkpoints are untouched.
    """
    staging = folder / f".{checkpoint_name(step)}.{attempt}.tmp"
    error: Exception | None = None
    if groups.rank == 0:
        try:
            _make_staging(folder, staging)
        except OSError as failure:
            error = save_error(staging, failure)
    groups.agree(error)
    pending = PendingSave(groups, folder, staging, Manifest(step, attempt, groups.size, ()), state, keep, disk)
    with pending.removed_on_failure():
        groups.agree(_check_staging(staging))
        if disk is not None:
            disk.sweep(folder)
        _check_space(groups, folder, payload_bytes, disk)
        if disk is not None:
            disk.link(staging, step, attempt)
    pending.write(write_payload)
    return pending


class PendingSave:
    """A checkpoint on its way. A thread on each rank writes, then one on rank 0 publishes; nobody waits for them.

    With disks of the hosts, a thread on each rank copies in between, once all ranks know that all have written, and
    what. The threads make no collective calls, and what they send has a channel of its own: what they did is agreed in
    :meth:`advance`, which every rank calls at the same place of its program.

    Attributes:
        step: optimizer steps done.
        write_seconds: how long this rank's threads have worked.
    """

    def __init__(
        self,
        groups: Groups,
        folder: Path,
        staging: Path,
        manifest: Manifest,
        state: dict[str, Any],
        keep: Keep,
        disk: LocalDisk | None,
    ) -> None:
        """Args: as of :func:`begin`; ``manifest``: without files yet."""
        self.step = manifest.step
        self.write_seconds = 0.0
        self._groups = groups
        self._folder = folder
        self._staging = staging
        self._manifest = manifest
        self._state = state
        self._keep = keep
        self._disk = disk
        self._work: Future[Sequence[WrittenFile]] = Future()
        self._is_publishing = False

    @property
    def path(self) -> Path:
        """The checkpoint, once it is committed."""
        return self._folder / checkpoint_name(self.step)

    @property
    def is_idle(self) -> bool:
        """This rank's thread has done what it had to do, well or not. Not collective."""
        return self._work.done()

    def write(self, write_payload: WritePayload) -> None:
        """Let the thread write."""
        self._start(lambda: write_payload(self._staging))

    def advance(self) -> bool:
        """Wait for this rank's thread, agree on what all of them did, and publish or end. Collective.

        Returns:
            Whether the checkpoint is committed.

        Raises:
            SaveError: it failed; on every rank alike. Older checkpoints are untouched.
        """
        error: BaseException | None = self._work.exception()
        if isinstance(error, OSError):
            error = save_error(Path(error.filename or self._staging), error)
        if error is not None and not isinstance(error, Exception):
            raise error
        with self.removed_on_failure():
            self._groups.agree(error)
        if self._is_publishing:
            self._tidy_disk()
            return True
        if not self._manifest.files:
            self._manifest = replace(self._manifest, files=self._all_files())
            if self._disk is not None:
                self._start(partial(self._disk.copy, self._manifest))
                return False
        self._is_publishing = True
        self._start(self._publish if self._groups.rank == 0 else tuple)
        return False

    def _tidy_disk(self) -> None:
        """The disks of the hosts lose what has just been removed from the checkpoints. Collective."""
        try:
            if self._disk is not None:
                self._disk.sweep(self._folder, meanwhile=True)
        except SaveError as error:
            logger.warning("checkpoint %s is saved, but tidying up failed: %s", self.path.name, error)

    def _all_files(self) -> tuple[tuple[WrittenFile, ...], ...]:
        """Of each rank, what it has written. Collective."""
        gathered = self._groups.all_gather_object([asdict(file) for file in self._work.result()])
        files = tuple(tuple(written_file(fields) for fields in of_rank) for of_rank in gathered)
        if self._disk is None:
            return files
        return tuple(self._disk.with_hosts(rank, of_rank) for rank, of_rank in enumerate(files))

    def finish(self) -> Path:
        """Wait until the checkpoint is committed. Collective. Raises as :meth:`advance`."""
        while not self.advance():
            pass
        return self.path

    def join(self, seconds: float) -> None:
        """Wait for this rank's thread, but not longer than that, whatever becomes of the save. Not collective."""
        wait([self._work], seconds)

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """What fails in here fails on all ranks: rank 0 removes what was written."""
        try:
            yield
        except SaveError:
            if self._groups.rank == 0:
                shutil.rmtree(self._staging, ignore_errors=True)  # what cannot be removed now, the next save sweeps
            raise

    def _start(self, action: Callable[[], Sequence[WrittenFile]]) -> None:
        work: Future[Sequence[WrittenFile]] = Future()
        self._work = work

        def run() -> None:
            started = time.perf_counter()
            try:
                result = action()
            except BaseException as error:  # noqa: BLE001  (``advance`` raises it, on all ranks)
                work.set_exception(error)
            else:
                self.write_seconds += time.perf_counter() - started
                work.set_result(result)

        threading.Thread(target=run, name=f"save of step {self.step}", daemon=True).start()

    def _publish(self) -> Sequence[WrittenFile]:
        publish(self._staging, self.path, self._manifest, self._state)
        _after_commit(self._folder, self.step, self._keep)
        return ()


def _make_staging(folder: Path, staging: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    staging.mkdir()


def _check_staging(staging: Path) -> SaveError | None:
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not staging.is_dir():
        if time.monotonic() > deadline:
            return SaveError(
                f"{staging.parent} is not shared: {socket.gethostname()} does not see the folder that rank 0 made "
                f"there {SHARED_FOLDER_SECONDS:.0f} s ago. Put run.dir on storage that every host mounts at "
                "the same path."
            )
        time.sleep(0.1)
    return None


def _check_space(groups: Groups, folder: Path, payload_bytes: int, disk: LocalDisk | None) -> None:
    payloads = groups.all_gather_object(payload_bytes)
    needed_bytes = sum(payloads) if disk is None else disk.needed_bytes(payloads)
    where = folder if disk is None else disk.folder
    error: SaveError | None = None
    try:
        status = os.statvfs(where)
        free_bytes = status.f_bavail * status.f_frsize
        if free_bytes < needed_bytes:
            error = SaveError(
                f"cannot save a checkpoint in {where}: it needs about {needed_bytes:,} bytes and "
                f"{free_bytes:,} are free; {needed_bytes - free_bytes:,} bytes are missing. Nothing was written and "
                "older checkpoints are untouched; free some space, or lower checkpoint.keep_last."
            )
    except OSError as failure:
        error = save_error(where, failure)
    groups.agree(error)


def publish(staging: Path, final: Path, manifest: Manifest, state: dict[str, Any]) -> None:
    """Give a whole staging folder its name, after the state and, last, the manifest were added. One process calls it.

    Raises:
        OSError, SaveError: the file system failed.
    """
    write_json(staging / STATE_NAME, state)
    claimed = {file.name for files in manifest.files for file in files}
    rank_0 = list(manifest.files[0])
    for path in sorted(staging.rglob("*")):
        name = path.relative_to(staging).as_posix()
        if path.is_file() and name not in claimed:  # the state, and the model's config and tokenizer
            fsync_file(path)
            rank_0.append(WrittenFile(name, *hash_file(path)))
    whole = Manifest(manifest.step, manifest.attempt, manifest.world_size, (tuple(rank_0), *manifest.files[1:]))
    for path in staging.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
    write_json(staging / MANIFEST_NAME, manifest_to_json(whole))  # also fsyncs the staging folder
    if final.exists():  # a damaged one of an earlier line, or one that this run saves anew
        remove(final)
    staging.rename(final)
    fsync_folder(final.parent)


def _after_commit(folder: Path, step: int, keep: Keep) -> None:
    """The checkpoint is safe now: what fails here is said, and tried again after the next save."""
    try:
        write_bytes(folder / "latest", f"{checkpoint_name(step)}\n".encode())
        retain(folder, step, keep)
    except (OSError, SaveError) as error:
        logger.warning("checkpoint %s is saved, but tidying up in %s failed: %s", checkpoint_name(step), folder, error)

"""Saving a checkpoint as a whole, or not at all.

All ranks write into a hidden staging folder; rank 0 adds the state and, last, the manifest with every file's size and
hash; then the folder gets its name by a rename. A crash at any instant leaves the older checkpoints and at most a
staging folder, which the next save removes. If anything fails on any rank, all ranks agree on it and raise SaveError.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsft.checkpoint.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    Manifest,
    WrittenFile,
    checkpoint_name,
    manifest_to_json,
)
from dsft.checkpoint.retention import remove, retain, sweep
from dsft.dist import Groups
from dsft.errors import SaveError
from dsft.fsio import fsync_file, fsync_folder, hash_file, save_error, write_bytes, write_json

logger = logging.getLogger(__name__)

WritePayload = Callable[[Path], Sequence[WrittenFile]]
"""Writes this rank's files into a folder and says which they are; their data is on the disk when it returns."""

SHARED_FOLDER_SECONDS = 30.0
"""How long a network file system may take to show a new folder to the other hosts (NFS caches absent names)."""


def save(
    folder: Path,
    step: int,
    *,
    groups: Groups,
    attempt: str,
    write_payload: WritePayload,
    payload_bytes: int,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Commit checkpoint ``step`` into ``folder`` and keep the newest ``keep_last``. Collective.

    Args:
        folder: ``<run>/checkpoints``, on storage that every host sees; only the run's owner may write here.
        step: optimizer steps done.
        attempt: id of this start of the run.
        write_payload: writes this rank's part; may raise OSError or SaveError.
        payload_bytes: what this rank will write, about; compared with the free space before anything is written.
        state: plain JSON, the same on every rank (rank 0's is written).
        keep_last: whole checkpoints to keep, at least 1.

    Returns:
        The committed checkpoint's folder.

    Raises:
        SaveError: on every rank alike, naming the first rank that failed. Older checkpoints are untouched.
    """
    staging = folder / f".{checkpoint_name(step)}.{attempt}.tmp"
    _on_rank_0(groups, staging, lambda: _make_staging(folder, staging))
    try:
        groups.agree(_check_staging(staging))
        _check_space(groups, staging, payload_bytes)
        written, error = _write(write_payload, staging)
        groups.agree(error)
        files = groups.all_gather_object([asdict(file) for file in written])
        final = folder / checkpoint_name(step)

        def publish_all() -> None:
            manifest = Manifest(step, attempt, groups.size, tuple(tuple(WrittenFile(**f) for f in fs) for fs in files))
            publish(staging, final, manifest, state)

        _on_rank_0(groups, staging, publish_all)
    except SaveError:
        if groups.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # what cannot be removed now, the next save sweeps
        raise
    if groups.rank == 0:
        _after_commit(folder, step, keep_last)
    return final


def _on_rank_0(groups: Groups, path: Path, action: Callable[[], None]) -> None:
    """Do ``action`` on rank 0 only; an OSError there becomes a SaveError about ``path`` on every rank."""
    error: SaveError | None = None
    if groups.rank == 0:
        try:
            action()
        except OSError as failure:
            error = save_error(path, failure)
        except SaveError as failure:
            error = failure
    groups.agree(error)


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


def _check_space(groups: Groups, staging: Path, payload_bytes: int) -> None:
    needed_bytes = sum(groups.all_gather_object(payload_bytes))
    error: SaveError | None = None
    try:
        disk = os.statvfs(staging)
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes < needed_bytes:
            error = SaveError(
                f"cannot save a checkpoint in {staging.parent}: it needs about {needed_bytes:,} bytes and "
                f"{free_bytes:,} are free; {needed_bytes - free_bytes:,} bytes are missing. Nothing was written and "
                "older checkpoints are untouched; free some space, or lower checkpoint.keep_last."
            )
    except OSError as failure:
        error = save_error(staging, failure)
    groups.agree(error)


def _write(write_payload: WritePayload, staging: Path) -> tuple[Sequence[WrittenFile], Exception | None]:
    try:
        return write_payload(staging), None
    except OSError as failure:
        return (), save_error(Path(failure.filename or staging), failure)
    except Exception as failure:  # noqa: BLE001  (whatever it is, no rank may wait for one that is gone)
        return (), failure


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


def _after_commit(folder: Path, step: int, keep_last: int) -> None:
    """The checkpoint is safe now: what fails here is said, and tried again after the next save."""
    try:
        write_bytes(folder / "latest", f"{checkpoint_name(step)}\n".encode())
        retain(folder, step, keep_last)
    except (OSError, SaveError) as error:
        logger.warning("checkpoint %s is saved, but tidying up in %s failed: %s", checkpoint_name(step), folder, error)

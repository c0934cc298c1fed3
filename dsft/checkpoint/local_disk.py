"""Shards on a disk of each host (``checkpoint.local_dir``), each with a copy on the disk of the next host.

The run folder stays shared and holds all of a checkpoint but its shards, which are nearly all of it: manifest, state,
layout, the hashes of all blocks (16 bytes for 64 KiB). In place of a shard it has a symbolic link to
``<local_dir>/<run>/<step>.<attempt>/``, the same path on every host. So the rename of the shared folder is still the
commit, a shard is read as any other file where the host has it, and what no link names is left over and may go.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dsft.checkpoint.layout import shard_name
from dsft.checkpoint.manifest import Manifest, WrittenFile, checkpoint_name
from dsft.checkpoint.opened import OpenCheckpoint
from dsft.checkpoint.transfer import Transfer, first_damage, run_transfers
from dsft.dist import Channel, Groups
from dsft.errors import ConfigError, DamagedCheckpointError, SaveError
from dsft.fsio import fsync_folder, save_error, write_bytes

logger = logging.getLogger(__name__)

ID_NAME = "local_id"
"""In the folder of checkpoints: what tells this run's files on the disks from those of other runs."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Before a checkpoint is loaded: which shards go where, and whose headers this rank checks besides."""

    transfers: tuple[Transfer, ...]
    checked: tuple[int, ...]


class LocalDisk:
    """This host's disk, and who has which. Made by :func:`open_local_disk`.

    Attributes:
        folder: of this run, on the disk of the host.
        host_of: of each rank, the number of its host: that of the first rank on it.
        host_names: of each rank, the name of its host.
        keepers: of each rank, the rank on the next host that stores the copy of its shard; None: there is one host.
    """

    def __init__(
        self, folder: Path, host_of: Sequence[int], host_names: Sequence[str], groups: Groups, channel: Channel
    ) -> None:
        self.folder = folder
        self.host_of = tuple(host_of)
        self.host_names = tuple(host_names)
        self.keepers = tuple(self._keeper_of(rank) for rank in range(len(host_of)))
        self._groups = groups
        self._channel = channel
        self._sweeper: threading.Thread | None = None

    def needed_bytes(self, payload_bytes: Sequence[int]) -> int:
        """What a save will write on this host's disk, of what each rank writes: its own ranks' shards, and copies."""
        here = self.host_of[self._groups.rank]
        return sum(
            payload
            for payload, host, keeper in zip(payload_bytes, self.host_of, self.keepers, strict=True)
            if host == here or (keeper is not None and self.host_of[keeper] == here)
        )

    def _keeper_of(self, rank: int) -> int | None:
        hosts = sorted(set(self.host_of))
        if len(hosts) == 1:
            return None
        host = self.host_of[rank]
        there = self._ranks_on(hosts[(hosts.index(host) + 1) % len(hosts)])
        return there[self._ranks_on(host).index(rank) % len(there)]

    def _ranks_on(self, host: int) -> list[int]:
        return [rank for rank, its_host in enumerate(self.host_of) if its_host == host]

    # ------------------------------------------------------------------------------------------------ saving

    def sweep(self, checkpoints: Path, *, meanwhile: bool = False) -> None:
        """Remove what no checkpoint of the run names: left over, or of one that was removed. Collective.

        Args:
            meanwhile: in a thread, for which the next sweep waits: to remove large files takes a disk its time.

        Raises:
            SaveError: ``checkpoints`` is not the folder that it was at the start, as when its file system is no longer
                mounted: then it names nothing, and all of the disks would be taken for left over.
        """
        used: list[str] = []
        with self._groups.together(), _save_errors(checkpoints):
            if self._groups.rank == 0:
                self._check_is_mounted(checkpoints)
                used = _linked_folders(checkpoints)
        used = self._groups.broadcast_object(used)
        with self._groups.together(), _save_errors(self.folder):
            if self._sweeper is not None:
                self._sweeper.join()
            if self.host_of[self._groups.rank] == self._groups.rank:
                unused = [path for path in self.folder.iterdir() if path.name not in used]
                self._sweeper = threading.Thread(target=_remove, args=(unused,), name="sweep", daemon=True)
                self._sweeper.start()
                if not meanwhile:
                    self._sweeper.join()

    def _check_is_mounted(self, checkpoints: Path) -> None:
        if not (checkpoints / ID_NAME).is_file() or _name_of_run(checkpoints) != self.folder.name:
            raise SaveError(
                f"{checkpoints} is not the folder in which this run began: it has another {ID_NAME}, or none. Is its "
                "file system still mounted? Nothing was saved, and nothing is removed from the disks of the hosts."
            )

    def link(self, staging: Path, step: int, attempt: str) -> None:
        """Let this rank's shard in ``staging`` be written to the disk of the host. Collective."""
        with self._groups.together(), _save_errors(self.folder):
            place = self._place(step, attempt)
            place.mkdir(exist_ok=True)
            shard = staging / shard_name(self._groups.rank)
            shard.parent.mkdir(exist_ok=True)
            shard.symlink_to(place / shard.name)

    def _place(self, step: int, attempt: str) -> Path:
        return self.folder / f"{checkpoint_name(step)}.{attempt}"

    def with_hosts(self, rank: int, files: Sequence[WrittenFile]) -> tuple[WrittenFile, ...]:
        """A rank's files with the names of the hosts that store its shard."""
        hosts = tuple(self.host_names[r] for r in (rank, self.keepers[rank]) if r is not None)
        return tuple(replace(file, hosts=hosts) if file.name == shard_name(rank) else file for file in files)

    def copy(self, manifest: Manifest) -> Sequence[WrittenFile]:
        """Send each shard to the next host; for the thread that has written. Not collective, but all ranks call it.

        Raises:
            SaveError: a shard could not be read, sent or written.
            RankLostError: another rank is gone.
        """
        files = {file.name: file for files in manifest.files for file in files}
        place = self._place(manifest.step, manifest.attempt)
        transfers = [
            _transfer(rank, keeper, place / Path(shard_name(rank)).name, files, shard_name(rank))
            for rank, keeper in enumerate(self.keepers)
            if keeper is not None
        ]
        error = first_damage(run_transfers(transfers, self._channel, self._groups.rank))
        if error is not None:
            raise SaveError(f"a shard could not be copied to the next host: {error}") from error
        with _save_errors(place):
            fsync_folder(place)
            fsync_folder(self.folder)
        return ()

    # ------------------------------------------------------------------------------------------------ loading

    def load(self, opened: OpenCheckpoint, needed: Collection[int], read: Callable[[Collection[int]], None]) -> None:
        """Bring the shards that this host's ranks need to its disk, and read. Collective.

        Where a copy turns out to be damaged it is set aside, and another host's is used.

        Args:
            needed: writers of the shards that this rank needs.
            read: reads them; is told the writers whose shards this rank checks besides. Collective.

        Raises:
            DamagedCheckpointError: the hosts of this start do not have all of the checkpoint's shards, or what ``read``
                raises and no other copy can mend; on every rank alike.
            SaveError: a shard could not be written to this host's disk.
        """
        while True:
            plan = self._plan(opened, needed)
            try:
                self._groups.agree(first_damage(run_transfers(plan.transfers, self._channel, self._groups.rank)))
                read(plan.checked)
                return
            except DamagedCheckpointError as error:
                if not self._set_aside_damaged(opened):
                    raise
                if self._groups.rank == 0:
                    logger.warning("%s Another host has a copy of it, if one is left.", error)

    def _plan(self, opened: OpenCheckpoint, needed: Collection[int]) -> _Plan:
        world_size = opened.manifest.world_size
        held = [writer for writer in range(world_size) if opened.is_here(shard_name(writer))]
        known = self._groups.all_gather_object([held, sorted(needed)])
        holders = [[rank for rank, (has, _) in enumerate(known) if writer in has] for writer in range(world_size)]
        absent = [writer for writer in range(world_size) if not holders[writer]]
        if absent:
            raise self._absent(opened, absent)
        transfers = []
        for host in sorted(set(self.host_of)):
            ranks = self._ranks_on(host)
            wanted = {writer for rank in ranks for writer in known[rank][1]}
            missing = sorted(writer for writer in wanted if not set(holders[writer]) & set(ranks))
            for number, writer in enumerate(missing):
                name = shard_name(writer)
                path = Path(os.readlink(opened.folder / name))
                source = holders[writer][writer % len(holders[writer])]
                transfers.append(_transfer(source, ranks[number % len(ranks)], path, opened.files, name))
        checked = [writer for writer, ranks in enumerate(holders) if ranks[writer % len(ranks)] == self._groups.rank]
        return _Plan(tuple(transfers), tuple(checked))

    def _absent(self, opened: OpenCheckpoint, writers: Sequence[int]) -> DamagedCheckpointError:
        files = [opened.files[shard_name(writer)] for writer in writers]
        shown = ", ".join(f"{file.name} (stored on {' and '.join(file.hosts) or 'none'})" for file in files[:3])
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        here = ", ".join(dict.fromkeys(self.host_names))
        return DamagedCheckpointError(
            f"{opened.folder} is not whole on the hosts of this start ({here}): none of their disks has {shown}{more}. "
            "Start with a host that has them."
        )

    def _set_aside_damaged(self, opened: OpenCheckpoint) -> bool:
        """Rename the damaged shards on all hosts' disks; returns whether there were any. Collective."""
        ranks = self._ranks_on(self.host_of[self._groups.rank])
        is_any = False
        with self._groups.together():
            for writer in range(ranks.index(self._groups.rank), opened.manifest.world_size, len(ranks)):
                link = opened.folder / shard_name(writer)
                if link.is_symlink() and opened.is_here(shard_name(writer)):
                    opened.read(opened.files[shard_name(writer)].blocks)  # that one is shared, and has no copy
                    is_any |= _set_aside_if_damaged(opened, shard_name(writer))
        return any(self._groups.all_gather_object(is_any))


def open_local_disk(local_dir: str | None, checkpoints: Path, attempt: str, groups: Groups) -> LocalDisk | None:
    """Make the run's folder on each host's disk, and find out which ranks share one. Collective.

    Args:
        local_dir: ``checkpoint.local_dir``; None: shards go to the run folder, and None is returned.
        checkpoints: the run's shared folder of checkpoints.
        attempt: id of this start of the run.

    Raises:
        ConfigError: ``local_dir`` is not there on a host; on every rank alike.
        SaveError: it cannot be written; on every rank alike.
    """
    if local_dir is None:
        return None
    name = ""
    with groups.together(), _save_errors(checkpoints):
        if groups.rank == 0:
            _make_id(checkpoints)
            name = _name_of_run(checkpoints)
        if not Path(local_dir).is_dir():
            raise ConfigError(
                f"checkpoint.local_dir: {local_dir} is no folder on {socket.gethostname()}. Make it, under the same "
                "path, on a disk of every host."
            )
    folder = Path(local_dir).absolute() / str(groups.broadcast_object(name))
    mark = folder / f".{attempt}.rank-{groups.rank}"
    with groups.together(), _save_errors(folder):
        folder.mkdir(exist_ok=True)
        mark.touch()
    with groups.together(), _save_errors(folder):
        here = min(int(path.name.rpartition("-")[2]) for path in folder.glob(f".{attempt}.rank-*"))
    with groups.together(), _save_errors(folder):
        mark.unlink()
    found = groups.all_gather_object([here, socket.gethostname()])
    if len({host for host, _ in found}) == 1 and groups.rank == 0:
        logger.warning(
            "checkpoint.local_dir: all ranks see the same disk under %s, so no shard has a copy elsewhere: with that "
            "disk all checkpoints are lost.",
            local_dir,
        )
    return LocalDisk(folder, [host for host, _ in found], [name for _, name in found], groups, groups.channel())


def _make_id(checkpoints: Path) -> None:
    path = checkpoints / ID_NAME
    if not path.is_file():
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_bytes(path, f"{uuid.uuid4().hex}\n".encode())


def _name_of_run(checkpoints: Path) -> str:
    """Of a run in its place: a copy of the run folder, or one of the same path in another container, has another."""
    own_id = hashlib.sha256(f"{(checkpoints / ID_NAME).read_text()}{checkpoints.absolute()}".encode()).hexdigest()[:12]
    return f"{checkpoints.absolute().parent.name}-{own_id}"


def _linked_folders(checkpoints: Path) -> list[str]:
    """Names of the folders on the hosts' disks that checkpoints of a run refer to, those that were set aside too."""
    used = []
    for checkpoint in checkpoints.iterdir():  # not glob: what cannot be read must not look like what is not there
        shards = checkpoint / "shards"
        if not shards.is_dir():
            continue
        with os.scandir(shards) as entries:
            link = next((entry.path for entry in entries if entry.is_symlink()), None)  # all lead to the same folder
        if link is not None:
            used.append(Path(os.readlink(link)).parent.name)
    return used


def _remove(unused: Sequence[Path]) -> None:
    for path in unused:
        logger.info("removing %s: no checkpoint of the run needs it", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now, the next save sweeps
        else:
            with suppress(OSError):
                path.unlink()


def _transfer(source: int, destination: int, path: Path, files: dict[str, WrittenFile], name: str) -> Transfer:
    return Transfer(source, destination, path, files[name].num_bytes, files[files[name].blocks].sha256)


def _set_aside_if_damaged(opened: OpenCheckpoint, name: str) -> bool:
    try:
        opened.check_file(opened.files[name])
    except DamagedCheckpointError as error:
        path = Path(os.readlink(opened.folder / name))
        logger.warning("%s It is set aside as %s.damaged.", error, path.name)
        with _save_errors(path):
            path.rename(path.with_name(f"{path.name}.damaged"))
        return True
    return False


@contextmanager
def _save_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise save_error(Path(error.filename or path), error) from error

"""MANIFEST.json of a checkpoint: every file with its size and hash. A folder that has one is whole."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsft.constants import CHECKPOINT_VERSION
from dsft.errors import CheckpointError, DamagedCheckpointError

MANIFEST_NAME = "MANIFEST.json"
STATE_NAME = "state.json"


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One file of a checkpoint, as it was meant to be written.

    Attributes:
        name: path inside the checkpoint, with forward slashes.
        num_bytes: its length.
        sha256: hex digest, computed by the rank that wrote it, from what it wrote; empty when ``blocks`` is given.
        blocks: name of the file that holds the hash of each block of this one (``fsio.block_hash``); empty for files
            that are only read whole.
        hosts: names of the hosts on whose disks it lies (``local_disk``); empty for files in the checkpoint's folder.
    """

    name: str
    num_bytes: int
    sha256: str
    blocks: str = ""
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a whole checkpoint consists of.

    Attributes:
        step: optimizer steps done.
        attempt: id of the start of the run that saved it.
        world_size: ranks that saved it.
        files: per rank, the files it wrote.
    """

    step: int
    attempt: str
    world_size: int
    files: tuple[tuple[WrittenFile, ...], ...]


def checkpoint_name(step: int) -> str:
    """``step-00000042``"""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None when it is not such a name."""
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(match[1]) if match else None


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """As it is written, with a digest over itself."""
    body = {
        "version": CHECKPOINT_VERSION,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "world_size": manifest.world_size,
        "files": [[asdict(file) for file in files] for files in manifest.files],
    }
    return {**body, "digest": _digest(body)}


def written_file(fields: dict[str, Any]) -> WrittenFile:
    """Back from JSON; a manifest of before there were hosts has none."""
    return WrittenFile(**{**fields, "hosts": tuple(fields.get("hosts", ()))})


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises:
        DamagedCheckpointError: absent (the checkpoint was never committed) or damaged.
        CheckpointError: of another version.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("digest")
        if body["version"] != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"{path} has version {body['version']}, this dsft reads version {CHECKPOINT_VERSION}. Use the dsft "
                "that wrote it (state.json in the same folder names it)."
            )
        files = tuple(tuple(written_file(file) for file in files) for files in body["files"])
        manifest = Manifest(body["step"], body["attempt"], body["world_size"], files)
    except OSError as error:
        raise DamagedCheckpointError(
            f"{checkpoint} is not a whole checkpoint: its {MANIFEST_NAME} cannot be read ({error.strerror or error}). "
            "It is written last, so a save that was cut off leaves none; use an older checkpoint."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    if digest != _digest(body):
        raise _damaged(path)
    return manifest


def _damaged(path: Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} is damaged: it is not what was written. Use an older checkpoint.")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

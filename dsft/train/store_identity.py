"""By what a run knows its token stores: their contents or, where they are made while it trains, their raw files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dsft.store.layout import index_path
from dsft.store.manifest import RAW, fingerprint, raw_identity
from dsft.store.reader import SourceStore, read_index_metadata


def stores_identity(stores: Mapping[str, SourceStore]) -> dict[str, dict[str, Any]]:
    """What a checkpoint keeps of its sources' stores, each by the source's name: what it is known by, its raw identity,
    where it is, and how many shards it has."""
    return {
        "stores": {name: store.fingerprint for name, store in stores.items()},
        "raw_stores": {name: store.manifest.raw_identity for name, store in stores.items()},
        "store_places": {name: store.place for name, store in stores.items()},
        "num_shards": {name: store.num_shards for name, store in stores.items()},
    }


def is_as_it_was(store: SourceStore, name: str, saved: Mapping[str, Any], num_shards: int) -> bool:
    """Whether the first ``num_shards`` shards of a source are those that a checkpoint's ``state.json`` speaks of.

    Contents are compared where both starts know them. A store that is made while it is trained on is known by its raw
    files alone: then these are compared, and all of them, because unread ones decide what will be read.
    """
    known = saved["stores"].get(name)
    if _is_raw(known) or _is_raw(store.fingerprint):
        return bool(saved.get("raw_stores", {}).get(name) == store.manifest.raw_identity)
    return bool(known == store.manifest.fingerprint_of(num_shards))


def is_known_as(store: SourceStore, fingerprint_then: str, num_shards: int) -> bool:
    """Whether the first ``num_shards`` shards of a store that is whole are what an attempt of a run knew.

    Raises:
        DataError: an index cannot be read.
    """
    if not _is_raw(fingerprint_then):
        return fingerprint_then == store.manifest.fingerprint_of(num_shards)
    indices = (read_index_metadata(index_path(Path(store.place), shard)) for shard in range(num_shards))
    listing = fingerprint([index["raw_identity"] for index in indices])
    return fingerprint_then == raw_identity(store.manifest.recipe, listing)


def changed_stores(saved: Mapping[str, Any], identity: Mapping[str, Any], kept: Collection[str]) -> list[str]:
    """One line for each source whose tokens are not those of a checkpoint's run.

    Args:
        saved, identity: :func:`stores_identity` of the checkpoint and of this start.
        kept: sources that are as they were, or have grown.
    """
    changed = []
    for name in sorted(saved["stores"].keys() | identity["stores"].keys()):
        old, new = saved["stores"].get(name), identity["stores"].get(name)
        if old == new or name in kept:
            continue
        old_raw, new_raw = (one.get("raw_stores", {}).get(name) for one in (saved, identity))
        raw_file = None
        if old_raw is not None and new_raw is not None:
            raw_file = changed_raw_shard(Path(identity["store_places"][name]), old_raw, new_raw)
        changed.append(f"token store of {name}: {old} -> {new} ({raw_file or 'other tokens'})")
    return changed


def _is_raw(known: str | None) -> bool:
    return known is not None and known.startswith(RAW)


def changed_raw_shard(folder: Path, old: str, new: str) -> str | None:
    """The first raw file in which two listings of a source differ, for a message; None where they are not known.

    Args:
        folder: the source's token store.
        old, new: ``Manifest.raw_identity`` of both.
    """
    try:
        before, now = (json.loads(raw_shards_path(folder, identity).read_bytes()) for identity in (old, new))
    except (OSError, ValueError):
        return None
    for (name, identity), (name_now, identity_now) in zip(before, now, strict=False):
        if name != name_now:
            return f"{name} was removed" if [name, identity] not in now else f"{name_now} came before {name}"
        if identity != identity_now:
            return f"{name} was changed or replaced"
    longer, what = (now, "is new") if len(now) > len(before) else (before, "was removed")
    return f"{longer[min(len(before), len(now))][0]} {what}" if len(before) != len(now) else None


def raw_shards_path(folder: Path, identity: str) -> Path:
    """Where a source's store keeps the list of its raw shards as they were at a start: [path, identity] of each."""
    return folder / f"streamed-{identity.removeprefix(RAW)}.json"

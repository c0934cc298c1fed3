"""Every rank must have been started alike: one with another configuration or store would leave the others waiting."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.config.load import config_differences
from dsft.errors import ConfigError, DataError
from dsft.export.resolve import checkpoint_of, is_dsft_folder

if TYPE_CHECKING:
    from dsft.config.models import RunConfig
    from dsft.dist import Groups
    from dsft.store.reader import SourceStore

logger = logging.getLogger(__name__)

_MOST_SHOWN = 5


def check_same_configuration(groups: Groups, mine: dict[str, Any]) -> None:
    """Compare all that a rank was started with to what rank 0 was started with. Collective.

    Args:
        mine: nested JSON values: configuration, DeepSpeed configuration, command-line options.

    Raises:
        ConfigError: on every rank, naming the first rank that differs and its keys.
    """
    differences = config_differences(groups.broadcast_object(mine), mine)
    shown = "; ".join(
        f"{d.key.removeprefix('config.')} is {d.new!r}, and {d.old!r} on rank 0" for d in differences[:_MOST_SHOWN]
    )
    more = f"; and {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
    error = ConfigError(
        f"the ranks were not started alike: {shown}{more}. Give every host the same YAML, DeepSpeed file and options."
    )
    groups.agree(error if differences else None)


def check_same_stores(groups: Groups, stores: Sequence[SourceStore]) -> None:
    """Compare the token stores' content with rank 0's. Collective.

    Raises:
        DataError: on every rank, naming the first rank that reads another store.
    """
    first: list[str] = groups.broadcast_object([store.fingerprint for store in stores])
    errors = [
        DataError(
            f"the ranks read different token stores of {store.name!r}: {store.place} has fingerprint "
            f"{store.fingerprint[:12]}, and rank 0's has {fingerprint[:12]}. Put data.store_dir on storage that every "
            "host sees."
        )
        for store, fingerprint in zip(stores, first, strict=True)  # as many as in the configuration, which is the same
        if store.fingerprint != fingerprint
    ]
    groups.agree(errors[0] if errors else None)


def with_pinned_start(config: RunConfig, groups: Groups) -> RunConfig:
    """The configuration with the checkpoint that rank 0 takes ``model.path`` for. Collective.

    A run folder means its newest checkpoint; while that run still trains, ranks that looked one after the other would
    begin with different weights.

    Raises:
        CheckpointError: there is none.
    """
    path = config.model.path
    with groups.together():
        is_folder = groups.rank == 0 and path is not None and is_dsft_folder(Path(path))
        found = str(checkpoint_of(Path(path))) if is_folder and path is not None else None
    found = groups.broadcast_object(found)
    if found is None or found == path:
        return config
    logger.info("model.path: %s is %s", path, found)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": found})})

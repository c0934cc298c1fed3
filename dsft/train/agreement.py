"""Every rank must have been started alike: one with another configuration or store would leave the others waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsft.config.load import config_differences
from dsft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dsft.dist import Groups
    from dsft.store.reader import SourceStore

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
            f"the ranks read different token stores of {store.name!r}: {store.folder} has fingerprint "
            f"{store.fingerprint[:12]}, and rank 0's has {fingerprint[:12]}. Put data.store_dir on storage that every "
            "host sees."
        )
        for store, fingerprint in zip(stores, first, strict=True)  # as many as in the configuration, which is the same
        if store.fingerprint != fingerprint
    ]
    groups.agree(errors[0] if errors else None)

"""Sources that have grown between two starts of a run: which, and from which pass on their new shards are drawn.

A pass over a source is a permutation of its shards, so a pass that has begun keeps the shards that it began with, and
the next one takes all that are there. The first shards must be the ones of before, to the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsft.errors import ConfigError
from dsft.sampling.types import Cursor, Growth
from dsft.train import setup
from dsft.train.store_identity import is_as_it_was

if TYPE_CHECKING:
    from dsft.config.models import RunConfig
    from dsft.store.reader import SourceStore

_NO_END = 2**62


@dataclass(frozen=True, slots=True)
class Before:
    """A source as the checkpoint's run had it: the number of its shards, and how it had grown until then."""

    num_shards: int
    growth: Growth


def sources_before(saved: Mapping[str, Any], stores: Mapping[str, SourceStore]) -> dict[str, Before]:
    """The sources of a checkpoint's ``state.json`` whose first shards are still what they were.

    A checkpoint that does not say how many shards there were is of a dsft that did not let sources grow.
    """
    found = {}
    for name, store in stores.items():
        num_shards = saved.get("num_shards", {}).get(name, store.num_shards)
        if num_shards <= store.num_shards and is_as_it_was(store, name, saved, num_shards):
            pairs = saved.get("growth", {}).get(name, ())
            found[name] = Before(num_shards, tuple((int(epoch), int(number)) for epoch, number in pairs))
    return found


def growth_at(config: RunConfig, data: setup.Data, before: Mapping[str, Before], cursor: Cursor) -> list[Growth]:
    """How each source has grown for a run that goes on from ``cursor``.

    New shards are drawn from the first pass on that the window being read does not touch: the rest of that window is
    planned again, and must be what it was.

    Raises:
        ConfigError: a source has grown, and the run's length is given in passes over it.
    """
    names = [source.name for source in config.data.sources]
    grown = _grown(dict(zip(names, data.stores, strict=True)), before)
    old = [before[name].growth if name in before else () for name in names]
    if not grown or len(cursor.sources) != len(names):  # the planner says what is wrong with the latter
        return old
    if config.train.epochs is not None:
        raise ConfigError(
            f"data source {grown[0]!r} has grown since the checkpoint, and train.epochs counts passes over it: give "
            "train.tokens or train.steps instead, or go on with the old shards only."
        )
    still = [
        (*known, (_NO_END, before[name].num_shards)) if name in grown else known
        for name, known in zip(names, old, strict=True)
    ]
    positions = cursor.sources
    if cursor.pack:
        window = next(setup.build_planner(config, data, still).windows(cursor), None)
        positions = positions if window is None else window.next_cursor.sources
    return [
        (*known, (position.epoch + 1, before[name].num_shards)) if name in grown else known
        for name, known, position in zip(names, old, positions, strict=True)
    ]


def growth_lines(stores: Mapping[str, SourceStore], before: Mapping[str, Before]) -> list[str]:
    """For a person: which sources have grown."""
    return [
        f"source {name} has grown from {before[name].num_shards} shards; the new ones are drawn from its next pass on"
        for name in _grown(stores, before)
    ]


def _grown(stores: Mapping[str, SourceStore], before: Mapping[str, Before]) -> list[str]:
    return [name for name, one in before.items() if one.num_shards < stores[name].num_shards]

"""The hub commit of a run's model: the one that its first start found holds for all of them."""

from __future__ import annotations

import json
from pathlib import Path

from dsft.config.models import RunConfig


def pin_revision(config: RunConfig, saved: Path) -> RunConfig:
    """The configuration with the hub commit that this run began with, so that every start of it sees the same files."""
    if config.model.path is None or config.model.revision is not None or not saved.is_file():
        return config
    model = json.loads(saved.read_bytes())["model"]
    return with_revision(config, model["revision"]) if model["path"] == config.model.path else config


def with_revision(config: RunConfig, revision: str | None) -> RunConfig:
    """The configuration with ``model.revision``, unless that is None."""
    if revision is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": revision})})

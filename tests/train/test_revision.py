"""The commit of a hub model that a run began with is that of its later starts."""

from __future__ import annotations

import json
from pathlib import Path

from dsft.config.load import config_to_json
from dsft.config.models import RunConfig
from dsft.train.revision import pin_revision, with_revision


def config(path: str = "some/hub-name", revision: str | None = None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "r", "dir": "runs/r"},
            "model": {"path": path, "revision": revision},
            "data": {"pack_tokens": 64, "sources": [{"name": "s", "path": "p"}]},
            "train": {"tokens": 100, "global_batch_packs": 1, "lr": 1e-3},
        }
    )


def test_a_later_start_uses_the_commit_of_the_first(tmp_path: Path) -> None:
    saved = tmp_path / "config.json"
    assert pin_revision(config(), saved).model.revision is None
    saved.write_text(json.dumps(config_to_json(with_revision(config(), "abc123"))))
    assert pin_revision(config(), saved).model.revision == "abc123"
    assert pin_revision(config(path="another/model"), saved).model.revision is None
    assert pin_revision(config(revision="mine"), saved).model.revision == "mine"


def test_a_local_folder_has_no_commit() -> None:
    assert with_revision(config(), None) == config()

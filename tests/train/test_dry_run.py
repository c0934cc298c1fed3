"""What a dry run opens and closes again. The whole of it: tests/cli/test_train.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dsft.errors import ConfigError, SaveError
from dsft.train.dry_run import try_sinks


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="an extra")
def test_sinks_are_opened_and_nothing_is_left(tmp_path: Path) -> None:
    try_sinks(tmp_path, ["jsonl", "tensorboard"])
    assert list(tmp_path.iterdir()) == []


def test_a_sink_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else real(name, *a))
    with pytest.raises(ConfigError, match=r"dsft\[tensorboard\]"):
        try_sinks(tmp_path, ["tensorboard"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="gone"):
        try_sinks(tmp_path / "gone", ["jsonl"])

"""The start of a run: what is fixed at its first start stays fixed at the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsft.config.load import config_to_json
from dsft.config.models import RunConfig
from dsft.errors import ConfigError
from dsft.launch.owner import read_run_state, take_run_folder
from dsft.train.start import _write_failure, check_run_folder
from tests.support.alone import ALONE


def config(path: str = "some/hub-name", revision: str | None = None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "r", "dir": "runs/r"},
            "model": {"path": path, "revision": revision},
            "data": {"pack_tokens": 64, "sources": [{"name": "s", "path": "p"}]},
            "train": {"tokens": 100, "global_batch_packs": 1, "lr": 1e-3},
        }
    )


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "[1]", '{"run": '])
def test_a_models_folder_is_no_run_folder(tmp_path: Path, text: str) -> None:
    check_run_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(config())))
    check_run_folder(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"no run folder.*folder of its own"):
        check_run_folder(tmp_path)


def test_a_start_that_is_refused_leaves_a_finished_run_as_it_was(tmp_path: Path) -> None:
    folder = take_run_folder(tmp_path, ALONE)

    def status_after(before: str, step: int | None) -> str:
        folder.write_state(before, 3)
        _write_failure(folder, step, ConfigError("give --resume auto"))
        return read_run_state(tmp_path)["status"]

    assert status_after("finished", None) == "finished"
    assert status_after("stopped", None) == "stopped"
    assert status_after("running", None) == "failed"  # its last start died without a word
    assert status_after("stopped", 4) == "failed"
    folder.release()

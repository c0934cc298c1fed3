"""Ranks that were started with different things stop at once, all of them, and say which things."""

from __future__ import annotations

from pathlib import Path

from dsft.config.models import RunConfig
from dsft.dist import Groups
from dsft.errors import ConfigError, DataError
from dsft.store.reader import SourceStore
from dsft.train import agreement
from dsft.train.agreement import check_same_configuration, check_same_stores
from tests.support.ranks import run_ranks
from tests.support.stores import text_document, write_store


def compare(groups: Groups, folder: Path, differ: bool) -> list[str]:
    rank = groups.rank if differ else 0
    found = []
    try:
        config = {"log": {"every_steps": 1 + rank}, "train": {"lr": 1e-5, "betas": [0.9, 0.95]}}
        check_same_configuration(groups, {"config": config, "options": {"resume": None}})
    except ConfigError as error:
        found.append(str(error))
    try:
        check_same_stores(groups, [SourceStore(folder / "same"), SourceStore(folder / f"store-{rank}")])
    except DataError as error:
        found.append(str(error))
    return found


def test_ranks_that_differ_stop_together(tmp_path: Path) -> None:
    write_store(tmp_path / "same", [text_document([1, 2, 3])], name="papers")  # held-out set and source of one name
    write_store(tmp_path / "store-0", [text_document([4, 5, 6])], name="papers")
    write_store(tmp_path / "store-1", [text_document([4, 5, 7])], name="papers")
    assert run_ranks(compare, 2, tmp_path, False, timeout_seconds=60) == [[], []]
    for config_error, data_error in run_ranks(compare, 2, tmp_path, True, timeout_seconds=60):
        assert "log.every_steps is 2, and 1 on rank 0" in config_error
        assert "rank 1 on" in config_error
        assert "different token stores of 'papers'" in data_error


def config_with(path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "r", "dir": "runs/r"},
            "model": {"path": str(path)},
            "data": {"pack_tokens": 64, "sources": [{"name": "s", "path": "p"}]},
            "train": {"tokens": 100, "global_batch_packs": 1, "lr": 1e-3},
        }
    )


def _pinned_on_two_ranks(groups: Groups, run: Path) -> str | None:
    """Each rank finds another newest checkpoint, as when the run saves one between their looks."""
    real = agreement.checkpoint_of
    agreement.checkpoint_of = lambda path: path / "checkpoints" / f"step-{groups.rank:08d}"
    try:
        return agreement.with_pinned_start(config_with(run), groups).model.path
    finally:
        agreement.checkpoint_of = real


def test_every_rank_starts_from_the_checkpoint_that_rank_0_found(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    found = run_ranks(_pinned_on_two_ranks, 2, tmp_path / "run", timeout_seconds=60)
    assert found == [str(tmp_path / "run" / "checkpoints" / "step-00000000")] * 2

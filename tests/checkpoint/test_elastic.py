"""Saved on n ranks, loaded on m, with the same or another ZeRO stage: bit-equal state, equal losses afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.checkpoint.discover import newest
from dsft.checkpoint.payload import load_engine
from dsft.dist import Groups
from tests.checkpoint.test_payload import save_step
from tests.support.ranks import run_ranks
from tests.support.toy_engine import SETTINGS, differing, make_engine, train, whole_state

pytestmark = [pytest.mark.launch]

SIZES = (1, 2, 3, 4)
STEP = 3
SAVED = ("stage 1", "stage 2 offload", "stage 3", "stage 3 offload", "stage 1 bf16", "stage 3 offload bf16")
LOADED = {  # rows: what was saved; each is loaded as itself and as another, of the same dtype
    "stage 1": ("stage 1", "stage 3 offload"),
    "stage 2 offload": ("stage 2 offload", "stage 3"),
    "stage 3": ("stage 3", "stage 2 offload"),
    "stage 3 offload": ("stage 3 offload", "stage 1"),
    "stage 1 bf16": ("stage 1 bf16", "stage 3 offload bf16"),
    "stage 3 offload bf16": ("stage 3 offload bf16", "stage 2 bf16"),
}


def save_all(groups: Groups, folder: str, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Ten losses of the uninterrupted run, by setting."""
    losses = {}
    for name in names:
        engine = make_engine(SETTINGS[name], seed=1)
        train(engine, 0, STEP, groups)
        state = whole_state(engine)
        where = Path(folder) / f"{name} on {groups.size}"
        save_step(engine, where, STEP, groups)
        if groups.rank == 0:
            torch.save(state, where / "whole.pt")
        losses[name] = train(engine, STEP, 10, groups)
    return losses


def load_all(groups: Groups, folder: str, pairs: list[tuple[int, str, str]]) -> list[tuple[list[str], list[float]]]:
    """What differs from the saved state, and the next ten losses, by pair."""
    found = []
    for size, saved, loaded in pairs:
        where = Path(folder) / f"{saved} on {size}"
        checkpoint = newest(where)
        assert checkpoint is not None
        engine = make_engine(SETTINGS[loaded], seed=2)
        load_engine(engine, checkpoint, groups)
        difference = differing(whole_state(engine), torch.load(where / "whole.pt"))
        found.append((difference, train(engine, STEP, 10, groups)))
    return found


def _pairs(size: int, per_transition: int) -> list[tuple[int, str, str]]:
    """(saved on, saved with, load with) for loading on ``size`` ranks: ``per_transition`` of all, in turn."""
    combinations = [(saved, loaded) for saved in SAVED for loaded in LOADED[saved]]
    pairs = []
    for other in SIZES:
        if other != size:
            first = (4 * other + size) * per_transition
            for number in range(first, first + per_transition):
                pairs.append((other, *combinations[number % len(combinations)]))
    return pairs


def _check(folder: Path, per_transition: int) -> None:
    losses: dict[int, dict[str, Any]] = {}
    for size in SIZES:
        losses[size] = run_ranks(save_all, size, str(folder), SAVED, timeout_seconds=300)[0]
    for size in SIZES:
        pairs = _pairs(size, per_transition)
        for results in run_ranks(load_all, size, str(folder), pairs, timeout_seconds=600):
            for (saved_on, saved, loaded), (difference, later) in zip(pairs, results, strict=True):
                what = f"{saved} on {saved_on} ranks -> {loaded} on {size} ranks"
                assert difference == [], what
                tolerance = 2e-2 if "bf16" in saved else 1e-5
                assert later == pytest.approx(losses[saved_on][saved], rel=0, abs=tolerance), what


@pytest.mark.timeout(600)
def test_each_change_of_size(tmp_path: Path) -> None:
    _check(tmp_path, per_transition=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_change_of_size_with_each_change_of_stage(tmp_path: Path) -> None:
    _check(tmp_path, per_transition=sum(len(loaded) for loaded in LOADED.values()))

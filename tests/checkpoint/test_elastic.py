"""Saved on n ranks, loaded on m, with the same or another ZeRO stage: bit-equal state, equal losses afterwards."""

from __future__ import annotations

import tempfile
from itertools import cycle
from pathlib import Path

import pytest
import torch

from dsft.checkpoint.discover import newest
from dsft.checkpoint.payload import load_engine
from dsft.dist import Groups
from tests.support.checkpoints import save_step
from tests.support.ranks import run_ranks
from tests.support.toy_engine import SETTINGS, differing, make_engine, train, whole_state

pytestmark = [pytest.mark.launch]

STEP = 3
Pair = tuple[int, str, str]
"""Saved on so many ranks, saved with, loaded with."""
CHANGES = [  # of ZeRO stage and offload; bf16 keeps its frozen weights in bf16, so it loads only as bf16
    ("stage 1", "stage 3 offload"),
    ("stage 3", "stage 3"),
    ("stage 3 offload", "stage 2 offload"),
    ("stage 2 offload", "stage 3"),
    ("stage 3 offload bf16", "stage 1 bf16"),
    ("stage 1", "stage 1"),
    ("stage 3 offload", "stage 3 offload"),
    ("stage 1 bf16", "stage 3 offload bf16"),
    ("stage 2 offload", "stage 2 offload"),
    ("stage 3", "stage 1"),
    ("stage 3 offload bf16", "stage 2 bf16"),
]


def visit(
    groups: Groups, folder: str, to_save: list[str], to_load: list[Pair]
) -> tuple[dict[str, list[float]], list[tuple[list[str], list[float]]]]:
    """Ten losses of each uninterrupted run that was saved; what differs after each load, and ten losses from there."""
    losses, loaded = {}, []
    for name in to_save:
        engine = make_engine(SETTINGS[name], seed=1)
        train(engine, 0, STEP, groups)
        state = whole_state(engine)
        where = Path(folder) / f"{name} on {groups.size}"
        save_step(engine, where, STEP, groups)
        if groups.rank == 0:
            torch.save(state, where / "whole.pt")
        losses[name] = train(engine, STEP, 10, groups)
    for size, saved, setting in to_load:
        where = Path(folder) / f"{saved} on {size}"
        checkpoint = newest(where)
        assert checkpoint is not None
        engine = make_engine(SETTINGS[setting], seed=2)
        load_engine(engine, checkpoint, groups)
        difference = differing(whole_state(engine), torch.load(where / "whole.pt"))
        loaded.append((difference, train(engine, STEP, 10, groups)))
    return losses, loaded


def _check(folder: Path, pairs: dict[int, list[Pair]]) -> None:
    """Visit 1, 2, 3, 4, 3, 2 and 1 ranks: each saves once, and loads what is there by then.

    Args:
        pairs: by the number of ranks to load on.
    """
    losses: dict[tuple[int, str], list[float]] = {}
    for position, size in enumerate((1, 2, 3, 4, 3, 2, 1)):
        is_first = position < 4
        needed = sorted({saved for of_size in pairs.values() for n, saved, _ in of_size if n == size})
        to_load = [pair for pair in pairs[size] if (pair[0] < size) == is_first]
        results = run_ranks(visit, size, str(folder), needed if is_first else [], to_load, timeout_seconds=900)
        losses |= {(size, name): found for name, found in results[0][0].items()}
        for _, loaded in results:
            for (saved_on, saved, setting), (difference, later) in zip(to_load, loaded, strict=True):
                what = f"{saved} on {saved_on} ranks -> {setting} on {size} ranks"
                assert difference == [], what
                tolerance = 2e-2 if "bf16" in saved else 1e-5
                assert later == pytest.approx(losses[saved_on, saved], rel=0, abs=tolerance), what


@pytest.mark.timeout(600)
def test_each_change_of_size(tmp_path: Path) -> None:
    """Each of the twelve changes of size once, and each change of stage at least once."""
    changes = cycle(CHANGES)
    _check(tmp_path, {m: [(n, *next(changes)) for n in (1, 2, 3, 4) if n != m] for m in (1, 2, 3, 4)})


def main() -> None:
    """``python -m tests.checkpoint.test_elastic``: each change of size with each change of stage (many minutes)."""
    sizes = (1, 2, 3, 4)
    with tempfile.TemporaryDirectory() as folder:
        _check(Path(folder), {m: [(n, *change) for n in sizes if n != m for change in CHANGES] for m in sizes})
    print(f"{4 * 3 * len(CHANGES)} loads: bit-equal whole state, equal losses")


if __name__ == "__main__":
    main()

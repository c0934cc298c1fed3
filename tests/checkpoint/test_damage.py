"""Whatever is wrong with a checkpoint is found while it is loaded, on all ranks, and the one before it is used."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsft.checkpoint.payload import load_engine
from dsft.checkpoint.verify import newest_usable
from dsft.dist import Groups
from dsft.errors import CheckpointError
from tests.support.checkpoints import save_step
from tests.support.ranks import run_ranks
from tests.support.toy_engine import SETTINGS, differing, make_engine, train, whole_state

pytestmark = [pytest.mark.launch]

NUM_FLIPS = 100


@contextmanager
def damaged(path: Path, how: str, other: Path, random_numbers: random.Random) -> Iterator[None]:
    """Damage a file in one way, and put it back afterwards."""
    data = path.read_bytes()
    if how == "flip":
        position = random_numbers.randrange(len(data))
        flipped = data[position] ^ (1 << random_numbers.randrange(8))
        path.write_bytes(data[:position] + bytes([flipped]) + data[position + 1 :])
    elif how == "truncate":
        path.write_bytes(data[: random_numbers.randrange(len(data))])
    elif how == "remove":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "swap":
        shutil.copyfile(other, path)
    try:
        yield
    finally:
        path.write_bytes(data)


def load_damaged(groups: Groups, folder: str) -> list[tuple[str, str, list[str]]]:
    """(what was done, checkpoint that was used or the error, what of it differs) for each kind of damage."""
    logging.getLogger("dsft.checkpoint.verify").setLevel(logging.ERROR)  # it says each of these cases
    engine = make_engine(SETTINGS["stage 3"], seed=1, hidden=301)  # several blocks a shard
    older, newer = Path(folder) / "step-00000001", Path(folder) / "step-00000002"
    train(engine, 0, 1, groups)
    save_step(engine, Path(folder), 1, groups)
    at_older = whole_state(engine)
    train(engine, 1, 1, groups)
    save_step(engine, Path(folder), 2, groups)
    at_newer = whole_state(engine)
    train(engine, 2, 1, groups)
    another = save_step(engine, Path(folder) / "another", 2, groups)  # same names and sizes, later content

    def attempt() -> tuple[str, list[str]]:
        def use(checkpoint: Path) -> Path:
            load_engine(engine, checkpoint, groups)
            return checkpoint

        try:
            used = newest_usable(Path(folder), groups, use)
        except CheckpointError as error:
            return str(error), []
        return used.name, differing(whole_state(engine), at_newer if used == newer else at_older)

    files = sorted(path.relative_to(newer).as_posix() for path in newer.rglob("*") if path.is_file())
    sizes = [(newer / name).stat().st_size for name in files]
    random_numbers = random.Random(5)
    cases = [("flip", name) for name in random_numbers.choices(files, weights=sizes, k=NUM_FLIPS - len(files))]
    cases += [(how, name) for how in ("flip", "truncate", "remove", "empty") for name in files]
    cases += [("swap", name) for name in files if (newer / name).read_bytes() != (another / name).read_bytes()]
    found = [("nothing", *attempt())]
    for how, name in cases:
        rank_0_does = damaged(newer / name, how, another / name, random_numbers)
        if groups.rank == 0:
            rank_0_does.__enter__()
        groups.barrier()
        found.append((f"{how} {name}", *attempt()))
        groups.barrier()
        if groups.rank == 0:
            rank_0_does.__exit__(None, None, None)
    if groups.rank == 0:
        for checkpoint in (older, newer):
            shutil.copyfile(another / "MANIFEST.json", checkpoint / "MANIFEST.json")
    groups.barrier()
    return [*found, ("both have the manifest of another run", *attempt())]


@pytest.mark.timeout(400)
def test_any_damage_is_found_and_all_ranks_go_back_together(tmp_path: Path) -> None:
    ranks = run_ranks(load_damaged, 2, str(tmp_path), timeout_seconds=380)
    assert ranks[0] == ranks[1], "the same decision on all ranks"
    (first, *cases, last) = ranks[0]
    assert first == ("nothing", "step-00000002", [])
    assert sum(what.startswith("flip") for what, _, _ in cases) == NUM_FLIPS
    assert len(cases) >= NUM_FLIPS + 4 * 6
    for what, used, difference in cases:
        assert (used, difference) == ("step-00000001", []), what
    assert "damaged" in last[1]
    assert "a resume was asked for" in last[1]

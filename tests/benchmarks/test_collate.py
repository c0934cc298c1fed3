"""The collating benchmark compares what is the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def program() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "collate.py"
    spec = importlib.util.spec_from_file_location("collate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("num_tokens", [2, 3, 5000])
def test_pack_sequences_makes_the_rows_of_the_collators(program: ModuleType, num_tokens: int) -> None:
    figures = program.measure(num_tokens, 3)  # checks before it measures
    assert figures["documents"] >= 1
    assert set(figures["milliseconds"]) >= {"ours", "transformers", "transformers_arrays"}


def test_another_row_is_noticed(program: ModuleType) -> None:
    examples = program.documents(3000)
    packed = list(program.pack_sequences(*program.stored(examples, 3000)))
    batch = program.peers(examples)["transformers"]()
    program.check(packed, batch)
    for number in range(5):
        changed = [tensor.clone() for tensor in packed]
        changed[number][1] += 1
        with pytest.raises(AssertionError):
            program.check(changed, batch)

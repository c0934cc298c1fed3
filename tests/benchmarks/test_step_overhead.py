"""The interval that the step benchmark reports."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def program() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "step_overhead.py"
    spec = importlib.util.spec_from_file_location("step_overhead", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("num", "low", "high"), [(20, 6, 15), (24, 7, 18), (60, 22, 39), (6, 1, 6)])
def test_interval_is_that_of_the_tables(program: ModuleType, num: int, low: int, high: int) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1, num + 1)).tolist()
    assert program.median_interval(values) == (low, high)


def test_interval_covers_the_median_as_often_as_it_says(program: ModuleType) -> None:
    samples = np.random.default_rng(1).lognormal(size=(2000, 24))
    covered = [low <= 1.0 <= high for low, high in (program.median_interval(row.tolist()) for row in samples)]
    assert 0.94 < np.mean(covered) < 0.99

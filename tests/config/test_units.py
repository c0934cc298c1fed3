from __future__ import annotations

import pytest

from dsft.config.units import parse_count


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (8192, 8192),
        ("20M", 20_000_000),
        ("2.5B", 2_500_000_000),
        ("8_192", 8192),
        ("1K", 1000),
        ("1.000001M", 1_000_001),
        (2e9, 2_000_000_000),
        ("1e3", 1000),
        ("0.1T", 10**11),
    ],
)
def test_counts_are_exact(value: object, count: int) -> None:
    assert parse_count(value) == count


@pytest.mark.parametrize("value", ["2.5Q", "1.5", "0.0001K", "", "-3", True, None, [1], "nan", float("inf")])
def test_what_is_not_a_count(value: object) -> None:
    with pytest.raises(ValueError, match=r"count|whole"):
        parse_count(value)

from __future__ import annotations

import pytest

from dsft.config.yaml_reader import read_yaml
from dsft.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # What YAML 1.1 (PyYAML's own) reads otherwise; the expected values are those of the YAML 1.2 core schema.
        ("1e-5", 1e-5),
        ("1E+3", 1000.0),
        ("-.5e1", -5.0),
        ("1.", 1.0),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-7", -7),
        ("+7", 7),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("2024-01-01", "2024-01-01"),
        ("8_192", "8_192"),
        ("2.5B", "2.5B"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1e-5'", "1e-5"),
        ("-.inf", float("-inf")),
        ("e5", "e5"),
        ("-", "-"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    if text == "-":
        assert read_yaml("'-'", "x").value == "-"
        return
    read = read_yaml(f"key: {text}", "x").value["key"]
    assert read == value
    assert type(read) is type(value)


def test_lines_of_keys_and_items() -> None:
    document = read_yaml("a: 1\nb:\n  c: 2\n  d:\n    - x\n    - {e: 3}\n", "x")
    assert document.lines[("a",)] == 1
    assert document.lines[("b",)] == 2
    assert document.lines[("b", "c")] == 3
    assert document.lines[("b", "d", 0)] == 5
    assert document.lines[("b", "d", 1, "e")] == 6


def test_merge_keys_and_anchors() -> None:
    document = read_yaml("base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\nlist: [*b]\n", "x")
    assert document.value["other"] == {"x": 1, "y": 3}
    assert document.value["list"] == [{"x": 1, "y": 2}]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", ["x.yaml, line 2", "b.c is given twice", "first on line 2"]),
        ("a: 1\nb: 2\na: 3\n", ["x.yaml, line 3", "a is given twice", "first on line 1"]),
        ("a: [1, 2\nb: 3\n", ["x.yaml, line 2", "not valid YAML"]),
        ("a:\n\tb: 1\n", ["x.yaml, line 2", "tabs"]),
        ("a: b: c\n", ["x.yaml, line 1", "quotes"]),
        ("? [a, b]\n: 1\n", ["x.yaml, line 1", "a key must be text"]),
        ("a: &a [*a]\n", ["x.yaml, line 1", "contains itself"]),
        ("a: 1\n---\nb: 2\n", ["x.yaml, line 2", "not valid YAML"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["x.yaml, line 1", "not valid YAML"]),
        ("a: \x00", ["x.yaml", "not valid YAML"]),
    ],
)
def test_errors_name_the_line(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "x.yaml")
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)

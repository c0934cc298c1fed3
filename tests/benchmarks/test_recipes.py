"""What the recipes are compared on: pages of docstrings, and arms that draw the same shares."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from dsft.config.load import load_config
from dsft.corpus.bridge_rules import BridgeSettings, bridge_pairs
from dsft.demo.corpus import Module

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
DOCSTRING = "Return the words of a file, one after the other.\n\n    More.\n    "
SOURCE = f'"""Reads things."""\ndef read(path):\n    """{DOCSTRING}"""\n'


@pytest.fixture(scope="module")
def program() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("recipes")
    finally:
        sys.path.remove(str(FOLDER))


def test_a_page_has_the_docstrings_below_headings_that_the_bridge_finds(program: ModuleType) -> None:
    corpora = sys.modules["recipes_corpora"]
    (page,) = corpora.manual_pages(Module("reader", SOURCE))
    title, heading = f"reader\n{'=' * 6}", f"reader.read\n{'-' * 11}"
    assert (
        page
        == f"{title}\n\nReads things.\n\n{heading}\n\nReturn the words of a file, one after the other.\n\nMore.\n\n"
    )
    assert "section" in {pair.rule for pair in bridge_pairs(page, BridgeSettings(min_words=2))}
    assert list(corpora.manual_pages(Module("reader", "x = 1"))) == []
    assert list(corpora.manual_pages(Module("_reader", SOURCE))) == []
    long = SOURCE + "".join(SOURCE.partition("\n")[2].replace("read(", f"read{number}(") for number in range(80))
    pages = list(corpora.manual_pages(Module("reader", long)))
    assert len(pages) > 1
    assert all(page.startswith("reader\n======\n\n") for page in pages)
    assert "".join(pages).count("Return the words") == 81


def test_arms_draw_the_same_share_of_text(program: ModuleType, tmp_path: Path) -> None:
    assert all(sum(weights.values()) == pytest.approx(1) for weights in program.WEIGHTS.values())
    together = ("stages", "mixed", "few", "bridge")
    assert {program.WEIGHTS[arm]["text"] for arm in together} == {0.7}
    assert program.WEIGHTS["fewer"]["few"] == program.WEIGHTS["bridge"]["few"]
    budget = program.Budget(1000, 20_000, (1,), 8)
    for arm in program.WEIGHTS:
        content = program.arm_config(tmp_path, tmp_path / "model", budget, arm, 3)
        content["run"] = {"name": arm, "dir": str(tmp_path / arm), "seed": content.pop("seed")}
        (tmp_path / "arm.yaml").write_text(yaml.safe_dump(content))
        config = load_config(tmp_path / "arm.yaml")
        assert (config.train.tokens, config.run.seed) == (20_000, 3)
        if arm == "stages":  # half the tokens, then half: 0.5 * 1.0 + 0.5 * 0.4
            shares = [stage.weights["text"] for stage in config.data.stages]
            assert sum(shares) / 2 == pytest.approx(program.WEIGHTS[arm]["text"])


def test_the_table_has_a_row_an_arm_with_its_spread(program: ModuleType) -> None:
    arm = {metric: sys.modules["arms"].summary([1.0, 2.0]) for metric in program.METRICS}
    rows = program.table("manual", {"nothing": arm, "mixed": arm}).splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| manual", "|---|---|---|---|---|---|", "| nothing", "| mixed"]
    assert rows[2].count("1.500 ± 0.707") == len(program.METRICS) - 1
    assert {row.count("|") for row in rows} == {len(program.METRICS) + 2}

"""The page of a run: what it says is what the run recorded, and it needs nothing but itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dsft.cli.main import run as dsft
from dsft.errors import DataError
from dsft.report.chart import MAX_POINTS, chart, number, thinned, ticks
from dsft.report.content import verdicts
from dsft.report.history import read_history
from dsft.report.page import html_page, markdown

CONFIG = {
    "run": {"name": "medical <b>"},
    "model": {"path": "models/base"},
    "data": {"pack_tokens": 512, "sources": [{"name": "papers", "format": "text"}]},
    "train": {"steps": 4000, "tokens": None, "epochs": None, "global_batch_packs": 8},
}


def step(number: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "tokens_trained": number * 4096, "num_skipped": 0, "loss": loss,
        "loss_by_source": {"papers": loss}, "lr": 1e-4, "grad_norm": 1.0, "seconds": 0.5,
        "peak_memory_bytes": 2 * 10**9,
        "supervised_tokens_per_second": 900.0, "other_tokens_per_second": 90.0, "padding_tokens_per_second": 1.0,
    }  # fmt: skip


def evaluation(number: int, loss: float, f1: float) -> dict[str, Any]:
    answer = {"prompt": "Why?", "answer": f"<script>alert({number})</script>", "reference": "because | of\nit"}
    return {
        "kind": "evaluation", "step": number, "set": "qa", "loss": loss, "loss_interval": [loss - 0.1, loss + 0.1],
        "f1": f1,
        "scores": {"rougeL": f1}, "intervals": {"f1": [f1 - 0.2, f1 + 0.2], "rougeL": [f1 - 0.01, f1 + 0.01]},
        "samples": [answer],
    }  # fmt: skip


def write_run(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "run_state.json").write_text(json.dumps({"status": "finished", "outcome": "finished", "step": 4000}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that crashed after step 20 and went on from step 10: ten steps and an evaluation were rolled back."""
    records = [evaluation(0, 5.0, 0.1), *(step(n, 5 - n / 1000) for n in range(1, 21)), evaluation(15, 99.0, 0.1)]
    records += [
        {"kind": "checkpoint", "step": 10, "stall_seconds": 1.5, "write_seconds": 9.0},
        {"kind": "resume", "step": 10},
    ]
    records += [*(step(n, 5 - n / 1000) for n in range(11, 4001)), {"kind": "warning", "message": "a <loud> word"}]
    records += [evaluation(4000, 1.0, 0.3)]
    run = write_run(tmp_path / "run", records)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # being written
    return run


def test_what_a_crash_rolled_back_is_not_in_the_history(folder: Path) -> None:
    history = read_history(folder)
    assert [record["step"] for record in history.steps] == list(range(1, 4001))
    assert [record["step"] for record in history.evaluations] == [0, 4000]
    assert len(history.resumes) == 1


def test_verdicts_follow_the_intervals(folder: Path) -> None:
    words = {one.score: one.word for one in verdicts(read_history(folder))}
    assert words == {"loss": "better", "f1": "no difference shown", "rougeL": "better"}
    records = [evaluation(0, 1.0, 0.3), evaluation(9, 5.0, 0.1)]
    assert {one.word for one in verdicts(read_history(write_run(folder, records)))} == {"worse", "no difference shown"}
    assert {one.word for one in verdicts(read_history(write_run(folder, records[:1])))} == {"measured once"}
    del records[1]["loss_interval"]
    assert verdicts(read_history(write_run(folder, records)))[0].word == "no interval"


@pytest.mark.parametrize(
    ("interval", "word"), [([0.1, 0.3], "risen"), ([-0.3, -0.1], "fallen"), ([-0.1, 0.3], "no difference shown")]
)
def test_a_bias_test_is_judged_by_its_change(folder: Path, interval: list[float], word: str) -> None:
    first = {"kind": "bias", "step": 0, "set": "jobs", "test": "templates", "value": 0.5, "change_interval": [0.0, 0.0]}
    run = write_run(folder, [first, {**first, "step": 9, "value": 0.7, "change_interval": interval}])
    (one,) = verdicts(read_history(run))
    assert (one.set_name, one.score, one.word) == ("jobs", "bias: templates", word)
    assert word in html_page(read_history(run))


class _Strict(HTMLParser):
    """Open elements are closed in order; what could load something is collected."""

    VOID = frozenset({"meta", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loading: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object", "image", "use"):
            self.loading.append(tag)
        self.loading += [name for name, _ in attrs if name in ("src", "href", "xlink:href", "onload", "onclick")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_small_and_loads_nothing(folder: Path) -> None:
    page = html_page(read_history(folder))
    parser = _Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert parser.loading == []
    assert not re.search(r"https?://|url\(|@import", page)
    assert len(page.encode()) < 3_000_000
    assert "&lt;script&gt;alert(4000)" in page
    assert "medical &lt;b&gt;" in page
    for said in ("finished", "4,000 steps", "a &lt;loud&gt; word", "no difference shown", "2.00 GB", 'class="mark"'):
        assert said in page
    assert 5 <= page.count("<figure>") <= 6


def test_markdown_keeps_its_tables(folder: Path) -> None:
    text = markdown(read_history(folder))
    assert "because \\| of<br>it" in text
    assert "<script>" not in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| qa")}
    assert widths == {6}


def test_the_command_writes_both(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsft(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert (folder / "report.md").read_text().startswith("# medical")
    assert dsft(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    (folder / "metrics.jsonl").write_text("{damaged\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: not JSON"):
        read_history(folder)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    page = html_page(read_history(write_run(tmp_path / "run", [])))
    assert "<figure>" not in page
    assert "What ran" in page


def test_lines_keep_their_shape_when_thinned() -> None:
    points = [(float(x), float(x % 2)) for x in range(10_001)]
    few = thinned(points)
    assert 100 < len(few) <= MAX_POINTS
    assert all(abs(y - 0.5) < 0.1 for _, y in few)
    assert thinned(points[:7]) == points[:7]
    assert "NaN" not in chart("Loss", "step", "", {"a": [(1.0, float("nan")), (2.0, 3.0)], "b": [(1.0, float("inf"))]})
    assert chart("Loss", "step", "", {"a": []}) == ""


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (3.0, 3.0), (-2e-5, 7e-5), (1.0, 123456.0), (0.0, 0.0), (0.0001, 0.00010000000000000002)],
)
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 9
    assert len({number(tick) for tick in found}) == len(found)

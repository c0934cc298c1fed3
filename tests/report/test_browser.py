"""The report in a real browser: headless Chromium, no network, a telephone's width and a desktop's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dsft.report.history import read_history
from dsft.report.page import html_page
from dsft.train.followed_advice import ADVICE_NAME
from tests.report.test_goals import EVALUATE, advice
from tests.report.test_report import CONFIG, evaluation, step, write_run
from tests.support.browser import chromium, visit

pytestmark = [pytest.mark.slow]

PROGRAM = chromium()
LONG = "runs/" + "a-folder-without-any-space-" * 8


@pytest.fixture
def program() -> str:
    if PROGRAM is None:
        assert not os.environ.get("CI"), "CI installs chromium"
        pytest.skip("needs chromium")
    return PROGRAM


def page_of(folder: Path) -> str:
    """A run with long names, so that what can overflow does."""
    records = [evaluation(0, 5.0, 0.1), *(step(number, 5 - number / 1000) for number in range(1, 4001))]
    records += [{"kind": "checkpoint", "step": 10, "stall_seconds": 1.5, "write_seconds": 9.0}]
    records += [{"kind": "resume", "step": 4000}, {"kind": "warning", "message": f"limit passed: {LONG}"}]
    last = evaluation(4000, 1.0, 0.3)
    records += [{**last, "samples": [{**last["samples"][0], "answer": "x" * 300}]}]
    write_run(folder, records)
    (folder / ADVICE_NAME).write_text(json.dumps(advice()))
    history = read_history(folder)
    history.config.update({**CONFIG, "run": {"name": LONG}, "evaluate": EVALUATE})
    return html_page(history)


def test_the_page_is_readable_on_a_telephone_and_on_a_desktop(program: str, tmp_path: Path) -> None:
    page = page_of(tmp_path / "run").encode()
    assert len(page) < 3_000_000
    found = visit(program, page, (400, 1400))
    assert found.console == ()
    assert set(found.requested) <= {"/", "/page.html", "/favicon.ico"}
    assert [view.inner_width for view in found.views] == [400, 1400]
    for view in found.views:
        assert view.scroll_width <= view.inner_width
        assert view.outside == ()
        assert view.smallest_chart_text is not None
        assert view.smallest_chart_text > 8.5
        for said in ("no difference shown", "The question", "What was recommended", "Goals", "reached"):
            assert said in view.text
    assert found.views[0].widest_box <= 400 - 16, "the scores do not fit beside one another"


def test_the_browser_sees_what_is_wrong(program: str, tmp_path: Path) -> None:
    """A page that loads something, complains and is too wide: so that the test above can fail."""
    page = page_of(tmp_path / "run").replace("</h1>", "</h1><img src='/missing.png'><p style='width:900px'>wide</p>", 1)
    found = visit(program, page.encode(), (400,))
    assert any("Content Security Policy" in line for line in found.console)
    assert found.views[0].scroll_width > 400
    assert "P" in found.views[0].outside

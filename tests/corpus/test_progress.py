"""What preparation says while it runs."""

from __future__ import annotations

import pytest

from dsft.corpus.progress import PrepareProgress, ProgressLines


def test_progress_lines() -> None:
    lines: list[str] = []
    show = ProgressLines(lines.append, every_seconds=0.0)
    show(PrepareProgress(0, "docs", 10, 1000, 4000, 500, 0, 1000))
    show(PrepareProgress(1, "docs", 5, 500, 2000, 500, 0, 1000, line="careful"))
    assert lines[0].startswith("prepare: docs: 50 %, 10 documents, 1,000 tokens")
    assert lines[1] == "prepare: careful"
    assert "50 %, 15 documents, 1,500 tokens" in lines[2]
    assert show.done_bytes == (1000, 2000)


def test_speeds_and_the_time_left_leave_out_what_was_found_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("dsft.corpus.progress.time.monotonic", lambda: now)
    lines: list[str] = []
    show = ProgressLines(lines.append, every_seconds=2.0)
    show(PrepareProgress(0, "docs", 0, 0, 0, 3_000_000, 3_000_000, 9_000_000))
    now = 102.0
    show(PrepareProgress(0, "docs", 700, 500_000, 1_800_000, 5_000_000, 3_000_000, 9_000_000))
    expected = "prepare: docs: 56 %, 700 documents, 500,000 tokens, 250,000 tokens/s, 0.9 MB/s, 0:00:04 left"
    assert lines == [expected]

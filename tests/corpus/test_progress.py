"""What preparation says while it runs."""

from __future__ import annotations

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

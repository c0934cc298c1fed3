"""A run keeps the advice it follows, and says so where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsft.errors import ConfigError
from dsft.train.followed_advice import ADVICE_NAME, keep_advice

ADVICE = {"verdict": {"method": "both"}, "factors": [], "evidence": {}}


def test_the_first_starts_copy_stays(tmp_path: Path) -> None:
    source, run = tmp_path / "advice.json", tmp_path / "run"
    run.mkdir()
    source.write_text(json.dumps(ADVICE))
    keep_advice(None, run)
    assert not list(run.iterdir())
    keep_advice(str(source), run)
    source.unlink()
    keep_advice(str(source), run)  # a resume, after the folder of the advice was removed
    assert json.loads((run / ADVICE_NAME).read_bytes()) == ADVICE


@pytest.mark.parametrize("content", [None, "{half", "[1]", '{"method": "both"}', "\udcff"])
def test_what_is_no_advice_is_named(tmp_path: Path, content: str | None) -> None:
    source = tmp_path / "other.json"
    if content is not None:
        source.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"run\.advice: .*other\.json"):
        keep_advice(str(source), tmp_path)
    assert not (tmp_path / ADVICE_NAME).exists()

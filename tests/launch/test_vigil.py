from __future__ import annotations

from pathlib import Path

import pytest

from dsft.launch import vigil
from dsft.launch.heartbeat import Beat


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def beat(rank: int, number: int, phase_seconds: float) -> Beat:
    return Beat(rank, "elsewhere", 1000 + rank, 0.0, "new", number, "step", 22, 30.0, phase_seconds)


@pytest.mark.parametrize(
    ("silent_for", "waiting_for", "named"),
    [(9.0, 9.0, []), (29.0, 29.0, []), (29.0, 30.5, [1]), (31.0, 29.0, [1]), (9.0, 31.0, [0])],
)
def test_who_is_silent_is_named_and_not_who_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_for: float, waiting_for: float, named: list[int]
) -> None:
    """Rank 1 was stopped; rank 0 beats and waits for it in a collective."""
    clock, beats = Clock(), {0: beat(0, 5, 0.0), 1: beat(1, 5, 0.0)}
    monkeypatch.setattr(vigil, "time", clock)
    monkeypatch.setattr(vigil, "read_beats", lambda folder: {})
    watching = vigil.Vigil(tmp_path)
    monkeypatch.setattr(vigil, "read_beats", lambda folder: beats)
    assert watching.hung() == []
    clock.now += silent_for
    beats[0] = beat(0, 6, waiting_for)
    assert [hang.beat.rank for hang in watching.hung()] == named

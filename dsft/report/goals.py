"""Verdict per goal: what the run's own YAML set out to do or to keep, and whether the evaluations show it.

The goals are read from ``evaluate``: a set with a ``source`` is to be learned, one with ``generate`` to be answered
better, and ``max_rise``, ``max_share`` and the bias tests are limits to keep. Nothing is judged that the file did not
ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dsft.report.content import Verdict, verdicts
from dsft.report.history import History

Word = Literal["reached", "missed", "not shown", "kept", "passed", "not measured"]
_OF_CHANGE: dict[str, Word] = {"better": "reached", "worse": "missed"}
ANSWER_SCORES = ("pass_rate", "f1")
"""What answers are judged by: the user's own checker where there is one, else token F1."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal.

    Attributes:
        wanted: in words. found: the numbers the verdict rests on.
        word: ``reached`` and ``missed`` need 95 % intervals that do not overlap, else it is ``not shown``; a limit is
            ``kept`` or ``passed``, as training itself decides; ``not measured``: fewer than two evaluations.
    """

    wanted: str
    word: Word
    found: str


def goals(history: History) -> list[Goal]:
    """Every goal of the run's configuration, in its order."""
    scores = {(one.set_name, one.score): one for one in verdicts(history)}
    section = history.config.get("evaluate", {})
    found: list[Goal] = []
    for held_out in section.get("sets", []):
        found += _of_set(history, held_out, scores)
    for test in section.get("bias", []):
        found += _of_bias(history, test)
    return found


def _of_set(history: History, held_out: dict[str, Any], scores: dict[tuple[str, str], Verdict]) -> Iterator[Goal]:
    name = str(held_out["name"])
    if held_out.get("source"):
        yield _learned(f"learn {held_out['source']}: lower loss on {name}", scores.get((name, "loss")))
    if held_out.get("generate"):
        score = next((one for one in ANSWER_SCORES if (name, one) in scores), ANSWER_SCORES[-1])
        yield _learned(f"answer {name} better: higher {score}", scores.get((name, score)))
    records = history.of_set(name)
    if held_out.get("max_rise") is not None:
        wanted = f"do not forget {name}: its loss rises by at most {held_out['max_rise']:g} nats a token"
        yield _kept(wanted, records, "loss", held_out["max_rise"], lambda last, first: float(last - first), at_least=2)
    share = (held_out.get("memorisation") or {}).get("max_share")
    if share is not None:
        wanted = f"do not learn {name} by heart: at most {share:g} of the documents continued word for word"
        yield _kept(wanted, records, "memorised_share", share, lambda last, _: float(last), at_least=1)


def _of_bias(history: History, test: dict[str, Any]) -> Iterator[Goal]:
    if test.get("max_rise") is None:
        return
    wanted = f"bias test {test['name']}: its value rises by at most {test['max_rise']:g}"
    records = [record for record in history.bias if record["set"] == test["name"]]
    if len(records) < 2:
        yield Goal(wanted, "not measured", "")
        return
    last = records[-1]
    low, high = last["change_interval"]
    is_passed = last["change"] > test["max_rise"] and low > 0  # as dsft.evaluate.bias.passed_limit decides
    yield Goal(wanted, "passed" if is_passed else "kept", f"{last['change']:+.4g} [{low:.4g}, {high:.4g}]")


def _learned(wanted: str, verdict: Verdict | None) -> Goal:
    if verdict is None or verdict.first_step == verdict.last_step:
        return Goal(wanted, "not measured", "")
    return Goal(wanted, _OF_CHANGE.get(verdict.word, "not shown"), f"{verdict.before:.4g} to {verdict.after:.4g}")


def _kept(
    wanted: str,
    records: list[dict[str, Any]],
    key: str,
    limit: float,
    value: Callable[[float, float], float],
    *,
    at_least: int,
) -> Goal:
    """A limit on the last record's value, given that and the first one's."""
    values = [record[key] for record in records if record.get(key) is not None]
    if len(values) < at_least:
        return Goal(wanted, "not measured", "")
    reached = value(values[-1], values[0])
    return Goal(wanted, "passed" if reached > limit else "kept", f"{reached:.4g}")

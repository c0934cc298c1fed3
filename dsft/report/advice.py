"""The question a run was made to answer and what ``dsft advise`` recommended, as name and value."""

from __future__ import annotations

from typing import Any

from dsft.report.history import History

_NOT_STATED = "not stated"


def question(history: History) -> list[tuple[str, str]]:
    """What was asked, in the user's words and answers; nothing where no advice is kept in the run's folder."""
    if history.advice is None:
        return []
    evidence: dict[str, Any] = history.advice["evidence"]
    situation = evidence["situation"]
    given = [
        f"{part[unit]:,} {words}"
        for name, unit, words in (
            ("text", "tokens", "tokens of text"),
            ("pairs", "pairs", "pairs"),
            ("general", "tokens", "tokens of general text"),
        )
        if (part := evidence.get(name)) is not None
    ]
    budget = situation.get("max_device_hours")
    return [
        ("question", "supervised, unsupervised, or both?"),
        ("goal", situation["goal"] or _NOT_STATED),
        ("task, control, sensitivity", ", ".join(situation[key] for key in ("task", "control", "sensitivity"))),
        ("budget", _NOT_STATED if budget is None else f"{budget:g} device-hours"),
        ("data", "; ".join(given) or "none"),
    ]


def recommendation(history: History) -> list[tuple[str, str]]:
    """The method with the rule that decided, the cost of each method, and the five factors."""
    if history.advice is None:
        return []
    verdict = history.advice["verdict"]
    rows = [
        ("recommended", f"{verdict['method']}: {verdict['because']}"),
        ("rule", f"{verdict['rule']} (source: {verdict['source']})"),
        ("would change with", verdict["otherwise"]),
    ]
    costs = {
        method: f"{method} {cost['tokens']:,} tokens"
        + ("" if cost["device_hours"] is None else f", {cost['device_hours']:.3g} device-hours")
        for method, cost in history.advice["costs"].items()
    }
    if costs:
        rows.append(("estimated cost", "; ".join(costs.values())))
    for factor in history.advice["factors"]:
        said = f"{factor['numbers']}. Speaks for: {factor['speaks_for']}. Risk: {factor['risk']}."
        rows.append((factor["name"], said))
    return rows

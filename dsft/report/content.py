"""What a report says, once for both of its forms: facts of the run, lines of its charts, verdicts, samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dsft.report.chart import Points
from dsft.report.history import History

_SCORES = {
    "loss": False,
    "bits_per_byte": False,
    "token_accuracy": True,
    "exact_match": True,
    "f1": True,
}
"""Score -> whether more is better. Further scores of answers (ROUGE, BLEU, pass rate) are all better higher."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: name of a line -> (step, value)."""

    title: str
    unit: str
    lines: dict[str, Points]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score of a set before and after training.

    Attributes:
        before, after: at the first and the last evaluation; the intervals are 95 %, None where none was recorded.
        word: ``better``, ``worse``, ``no difference shown`` (the intervals overlap), ``no interval``, or ``measured
            once``; of a bias test ``risen`` or ``fallen`` (the interval of the change does not contain 0).
    """

    set_name: str
    score: str
    before: float
    after: float
    before_interval: tuple[float, float] | None
    after_interval: tuple[float, float] | None
    first_step: int
    last_step: int
    word: str


@dataclass(frozen=True, slots=True)
class SamplePair:
    """The same prompt answered at the first and at the last evaluation."""

    set_name: str
    prompt: str
    reference: str
    before: str
    after: str


def facts(history: History) -> list[tuple[str, str]]:
    """What ran, as name and value."""
    config, steps = history.config, history.steps
    train = config["train"]
    length = next(f"{train[key]:,} {key}" for key in ("tokens", "steps", "epochs") if train.get(key) is not None)
    state = str(history.state.get("outcome") or history.state.get("status", "unknown"))
    sources = ", ".join(f"{source['name']} ({source['format']})" for source in config["data"]["sources"])
    found = [
        ("state", state + (f": {history.state['error']}" if history.state.get("error") else "")),
        ("model", str(config["model"].get("path") or "from scratch")),
        ("sources", sources),
        ("length asked for", length),
        ("batch", f"{train['global_batch_packs']} packs of {config['data']['pack_tokens']:,} tokens"),
    ]
    if steps:
        seconds = math.fsum(record["seconds"] for record in steps)
        found += [
            ("trained", f"{steps[-1]['step']:,} steps, {steps[-1]['tokens_trained']:,} tokens"),
            ("training time", duration(seconds)),
            ("steps without an update", str(steps[-1]["num_skipped"])),
            ("peak memory of a rank", f"{max(record['peak_memory_bytes'] for record in steps) / 1e9:.2f} GB"),
        ]
    saving = [record["stall_seconds"] for record in history.checkpoints]
    if saving:
        found.append(
            ("checkpoints", f"{len(saving)}, training stood {math.fsum(saving):.1f} s ({max(saving):.1f} at most)")
        )
    found.append(("restarts", str(len(history.resumes))))
    return found


def charts(history: History) -> list[Chart]:
    """Curves over steps; those without a point are left out by the page."""
    steps = history.steps
    names = list(dict.fromkeys(name for record in steps for name in record["loss_by_source"]))
    losses: dict[str, Points] = {
        f"train {name}": [(r["step"], r["loss_by_source"][name]) for r in steps if name in r["loss_by_source"]]
        for name in names
    }
    for name in history.sets():
        losses[f"held-out {name}"] = [(record["step"], record["loss"]) for record in history.of_set(name)]

    def column(key: str, scale: float = 1.0) -> Points:
        return [(record["step"], record[key] * scale) for record in steps if record.get(key) is not None]

    speed = {kind: column(f"{kind}_tokens_per_second") for kind in ("supervised", "other", "padding")}
    saves = [(record["step"], record["stall_seconds"]) for record in history.checkpoints]
    return [
        Chart("Loss", "nats a token", losses),
        Chart("Learning rate", "", {"learning rate": column("lr")}),
        Chart("Gradient norm", "before clipping", {"gradient norm": column("grad_norm")}),
        Chart("Throughput", "tokens a second by kind", speed),
        Chart("Peak memory of a rank", "GB", {"peak": column("peak_memory_bytes", 1e-9)}),
        Chart("Checkpoints", "seconds that training stood", {"save": saves}),
    ]


def verdicts(history: History) -> list[Verdict]:
    """Every score of every set, first against last evaluation."""
    found = []
    for name in history.sets():
        records = history.of_set(name)
        first, last = records[0], records[-1]
        for score in [*_SCORES, *last.get("scores", {})]:
            if _value(first, score) is not None and _value(last, score) is not None:
                found.append(_verdict(name, score, first, last))
    for name in dict.fromkeys(record["set"] for record in history.bias):
        records = [record for record in history.bias if record["set"] == name]
        found.append(_bias_verdict(records[0], records[-1]))
    return found


def samples(history: History) -> list[SamplePair]:
    """Answers at the first and the last evaluation, side by side."""
    found = []
    for name in history.sets():
        records = [record for record in history.of_set(name) if record.get("samples")]
        if not records:
            continue
        before = {sample["prompt"]: sample["answer"] for sample in records[0]["samples"]}
        for sample in records[-1]["samples"]:
            earlier = before.get(sample["prompt"], "")
            found.append(SamplePair(name, sample["prompt"], sample["reference"], earlier, sample["answer"]))
    return found


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _verdict(name: str, score: str, first: dict[str, Any], last: dict[str, Any]) -> Verdict:
    before, after = _value(first, score), _value(last, score)
    assert before is not None
    assert after is not None
    a, b = _interval(first, score), _interval(last, score)
    more_is_better = _SCORES.get(score, True)
    if first is last:
        word = "measured once"
    elif a is None or b is None:
        word = "no interval"
    elif not (b[0] > a[1] or b[1] < a[0]):
        word = "no difference shown"
    else:
        word = "better" if (after > before) == more_is_better else "worse"
    return Verdict(name, score, before, after, a, b, first["step"], last["step"], word)


def _bias_verdict(first: dict[str, Any], last: dict[str, Any]) -> Verdict:
    """By the paired interval of the change, from the record. A fall is not called better: see docs/evaluation.md."""
    low, high = last["change_interval"]
    word = "measured once" if first is last else "risen" if low > 0 else "fallen" if high < 0 else "no difference shown"
    intervals = (_interval(first, "value"), _interval(last, "value"))
    return Verdict(
        last["set"],
        f"bias: {last['test']}",
        first["value"],
        last["value"],
        *intervals,
        first["step"],
        last["step"],
        word,
    )


def _value(record: dict[str, Any], score: str) -> float | None:
    value = record.get(score, record.get("scores", {}).get(score))
    return None if value is None else float(value)


def _interval(record: dict[str, Any], score: str) -> tuple[float, float] | None:
    found = record.get(f"{score}_interval", record.get("intervals", {}).get(score))
    return None if found is None else (float(found[0]), float(found[1]))

"""Supervised or unsupervised: four ways to adapt one model, and whether ``dsft advise`` had said so before.

A small Llama is trained from scratch on a general part of the Python library's sources. Then, from that one model and
with equal token budgets and equal hyper-parameters, on a domain that is disjoint from it:

  nothing        the model as it is
  supervised     questions with answers only
  unsupervised   raw text only
  both           the first half raw text, then text and questions mixed (0.4 and 0.6)

Measured on documents set aside: perplexity of domain text, token F1 of the answers, loss of general text above what it
was (forgetting), the built-in bias sentences, and processor seconds of training. ``dsft advise`` sees the base model
and the data first; its rules (dsft/advise/rules.py) were committed before any arm was run.

An advice counts as wrong where another arm answers better (F1) by more than ``MARGIN``. ``--full``: three seeds, two
corpora more that played no part in writing the rules (the language reference, numpy's sources; one seed each), and
three altered versions on which the advice should change. Results go to ``--out``; the last line is one JSON object.

With ``--work FOLDER`` data, models and what is measured stay there, and the same command goes on after the last arm
that was measured when it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from arms import (
    LR,
    Budget,
    arm_run,
    compare,
    dsft,
    held_out,
    hold_sizes,
    make_base,
    once,
    seconds_of,
)
from four_arms_corpora import Corpus, General, make_data, write

from dsft.fsio import write_json

ARMS = ("nothing", "supervised", "unsupervised", "both")
METRICS = ("perplexity", "answer_f1", "forgetting", "bias", "device_seconds")
MARGIN = 0.02
"""Of F1. Chosen beforehand: about the standard error of a mean over a hundred answers."""
_NARROW = "What is the signature of"


def advise(folder: Path, base: Path, general: General, corpus: Corpus, name: str, *stated: str) -> dict[str, Any]:
    """What ``dsft advise`` says; its folder also holds the corpus split in two, which the arms are trained on."""
    out = folder / f"advise-{name}"
    shutil.rmtree(out, ignore_errors=True)
    answers = [] if "--task" in stated else ["--task", "broad"]
    given = ["--text", str(corpus.text), "--pairs", str(corpus.pairs), "--general", str(general.other)]
    other = ["--control", "low", "--sensitivity", "low", "--out", str(out)]
    dsft(folder, "advise", "--model", str(base), *given, *answers, *stated, *other)
    advice: dict[str, Any] = json.loads((out / "advice.json").read_bytes())
    return advice


def arm_config(out: Path, base: Path, budget: Budget, arm: str, seed: int) -> dict[str, Any]:
    """An arm's run."""
    sources = [
        {"name": name, "path": str(out / "data" / name / "train"), "format": form}
        for name, form in (("text", "text"), ("pairs", "messages"))
    ]
    data: dict[str, Any] = {"pack_tokens": 512, "chat_template": "chatml", "store_dir": str(out / "store")}
    if arm == "both":
        half, tokens = budget.arm_tokens // 2, budget.arm_tokens
        data["stages"] = [
            {"name": "text", "until_tokens": half, "weights": {"text": 1.0, "pairs": 0.0}},
            {"name": "mixed", "until_tokens": tokens, "weights": {"text": 0.4, "pairs": 0.6}},
        ]
    data["sources"] = {"both": sources, "unsupervised": sources[:1], "supervised": sources[1:]}[arm]
    sets = {**held_out(out, budget.answers), "bias": [{"name": "jobs", "kind": "templates"}]}
    return arm_run(budget, base, data, sets, seed)


def metrics_of(sets: dict[str, Any], general_loss: float, seconds: float) -> dict[str, float]:
    """The metrics of an arm from what its sets showed."""
    return {
        "perplexity": sets["text"]["perplexity"],
        "answer_f1": sets["pairs"]["f1"],
        "forgetting": sets["general"]["loss"] - general_loss,
        "bias": sets["jobs"]["value"],
        "device_seconds": seconds,
    }


def judge(advice: dict[str, Any], arms: dict[str, Any]) -> dict[str, Any]:
    """Whether another arm answers better than the recommended one by more than the margin."""
    arm = "nothing" if advice["method"] == "none" else advice["method"]
    scores = {name: arms[name]["answer_f1"]["mean"] for name in ARMS}
    best = max(scores, key=lambda name: scores[name])
    return {
        "recommended": advice["method"],
        "rule": advice["verdict"]["rule"],
        "because": advice["verdict"]["because"],
        "best_f1": best,
        "best_perplexity": min(ARMS, key=lambda name: arms[name]["perplexity"]["mean"]),
        "f1_behind_best": scores[best] - scores[arm],
        "right": scores[best] - scores[arm] <= MARGIN,
    }


def altered(folder: Path, base: Path, general: General, corpus: Corpus) -> dict[str, Any]:
    """Three versions on which the advice should change, and for which reason."""
    texts, pairs = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (corpus.text, corpus.pairs)
    )
    narrow = [pair for pair in pairs if pair["messages"][0]["content"].startswith(_NARROW)]
    files = {
        "50 pairs": (corpus.text, write(folder / "few-pairs.jsonl", pairs[:: len(pairs) // 50][:50])),
        "1 % of the text": (write(folder / "little-text.jsonl", texts[::100]), corpus.pairs),
        "narrow task": (corpus.text, write(folder / "narrow.jsonl", narrow)),
    }
    expected = {
        "50 pairs": ("unsupervised", "too few pairs"),
        "1 % of the text": ("supervised", "too little text"),
        "narrow task": ("supervised", "narrow task with enough pairs"),
    }
    found = {}
    for number, (name, (text, some)) in enumerate(files.items()):
        stated = ("--task", "narrow") if name == "narrow task" else ()
        version = Corpus(name, text, some)
        asking = partial(advise, folder, base, general, version, f"altered-{number}", *stated)
        advice = once(folder, f"altered-{number}", asking)
        verdict = advice["verdict"]
        found[name] = {
            "recommended": advice["method"],
            "rule": verdict["rule"],
            "because": verdict["because"],
            "expected": expected[name],
            "as_expected": (advice["method"], verdict["rule"]) == expected[name],
        }
    return found


def table(name: str, arms: dict[str, Any], verdict: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{name}", f"  {'':<13}" + "".join(f"{metric:>16}" for metric in METRICS)]
    for arm in ARMS:
        cells = []
        for metric in METRICS:
            one = arms[arm][metric]
            spread = "" if one["spread"] is None else f" ±{one['spread']:.2g}"
            cells.append(f"{one['mean']:.4g}{spread}")
        lines.append(f"  {arm:<13}" + "".join(f"{cell:>16}" for cell in cells))
    word = "right" if verdict["right"] else "WRONG"
    lines.append(f"  advice: {verdict['recommended']} ({verdict['rule']}): {word}; best answers: {verdict['best_f1']}")
    return "\n".join(lines)


def main() -> None:
    """Make the data, the base model, the advice, then the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three seeds, two corpora more, three altered versions")
    parser.add_argument("--out", type=Path, help="write the result to this file too")
    parser.add_argument("--work", type=Path, help="keep everything in this folder, and go on with what is there")
    options = parser.parse_args()
    budget = Budget(2_000_000, 300_000, (1, 2, 3), 48) if options.full else Budget(60_000, 20_000, (1,), 24)
    folder = Path(tempfile.mkdtemp(prefix="dsft-four-arms-")) if options.work is None else options.work.resolve()
    general, corpora = make_data(folder / "data")
    hold_sizes(folder, budget)
    base = Path(once(folder, "base", lambda: str(make_base(folder, general.base, budget.base_tokens))))
    names = ("library", "reference", "numpy") if options.full else ("library",)
    result: dict[str, Any] = {"budget": {**vars(budget), "lr": LR, "margin_f1": MARGIN}, "corpora": {}}
    for name in names:
        asking = partial(advise, folder, base, general, corpora[name], name)
        advice = once(folder, f"{name}-advice", asking)  # before any of its arms
        print(f"{name}: advice: {advice['method']} ({advice['verdict']['rule']})", flush=True)
        out = folder / f"advise-{name}"
        configure = partial(arm_config, out, base, budget)
        seeds = budget.seeds if name == "library" else budget.seeds[:1]
        arms = compare(folder, name, out, base, ARMS[1:], seeds, configure, metrics_of)
        verdict = judge(advice, arms)
        print(table(name, arms, verdict), flush=True)
        result["corpora"][name] = {"arms": arms, "advice": verdict, "evidence": advice["evidence"]}
        if name == "library":
            result["arms"] = arms
            result["altered"] = altered(folder, base, general, corpora[name]) if options.full else {}
            print(json.dumps(result["altered"], indent=1), flush=True)
        result["seconds"] = seconds_of(folder)
        if options.out is not None:  # after each corpus, so that a run that is cut off leaves what it had
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.out, result)
    if options.work is None:
        shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

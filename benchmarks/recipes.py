"""Both methods together: which of the recipes of ``examples/`` wins, with many pairs and with few.

A small Llama is trained from scratch on sources of one half of the Python library. From that one model, with equal
token budgets and equal hyper-parameters, on documentation and questions about it:

  nothing   the model as it is
  text      raw text only
  pairs     questions with answers only
  stages    half raw text, then 0.4 text and 0.6 questions (examples/stages.yaml)
  mixed     0.7 text and 0.3 questions from the first step (examples/mixed.yaml)
  few       as mixed, of the questions only ``few_pairs``
  fewer     0.9 text, 0.1 the same few questions: the bridge without its pairs
  bridge    0.7 text, 0.1 the same few questions, 0.2 pairs that ``dsft data bridge`` makes of the text
            (examples/bridge.yaml)

Two corpora: ``manual``, documentation pages made of the docstrings of the library's other half, with questions about
its definitions; ``reference``, the language reference, with questions which sentence follows another one. The text may
say what the questions ask (that is the case these recipes are for); no question that is asked at the end is trained
on, nor any pair of the bridge that shares 13 words with it.

Measured on documents set aside: bits per byte of the text, loss and token F1 of the answers, loss of general text above
what it was (forgetting), processor seconds of training.

Without arguments: the three recipes on the first corpus, far too short to tell anything. ``--full``: all arms, two
seeds on the first corpus and one on the second. Results go to ``--out``; the last line is one JSON object. With
``--work FOLDER`` the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
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
from recipes_corpora import NAMES, make_data, sizes_of

from dsft.fsio import write_json

WEIGHTS: dict[str, dict[str, float]] = {
    "text": {"text": 1.0},
    "pairs": {"pairs": 1.0},
    "stages": {"text": 0.7, "pairs": 0.3},  # of the whole run
    "mixed": {"text": 0.7, "pairs": 0.3},
    "few": {"text": 0.7, "few": 0.3},
    "fewer": {"text": 0.9, "few": 0.1},
    "bridge": {"text": 0.7, "few": 0.1, "bridge": 0.2},
}
METRICS = ("bits_per_byte", "answer_loss", "answer_f1", "forgetting", "device_seconds")
FEW_PAIRS = 50
RECIPES = ("stages", "mixed", "bridge")
"""Without ``--full``."""


def arm_config(out: Path, base: Path, budget: Budget, arm: str, seed: int) -> dict[str, Any]:
    """An arm's run."""
    paths = {name: str(out / "data" / name / "train") for name in ("text", "pairs", "few")}
    paths["bridge"] = str(out / "bridge.jsonl")
    data: dict[str, Any] = {"pack_tokens": 512, "chat_template": "chatml", "store_dir": str(out / "store")}
    data["sources"] = [
        {"name": name, "path": paths[name], "format": "text" if name == "text" else "messages", "weight": weight}
        for name, weight in WEIGHTS[arm].items()
    ]
    if arm == "stages":
        data["stages"] = [
            {"name": "text", "until_tokens": budget.arm_tokens // 2, "weights": {"text": 1.0, "pairs": 0.0}},
            {"name": "mixed", "until_tokens": budget.arm_tokens, "weights": {"text": 0.4, "pairs": 0.6}},
        ]
    return arm_run(budget, base, data, held_out(out, budget.answers), seed)


def make_bridge(folder: Path, out: Path, base: Path, budget: Budget) -> dict[str, Any]:
    """The bridge's pairs by the command; what it counted."""
    content = {key: value for key, value in arm_config(out, base, budget, "bridge", 17).items() if key != "seed"}
    file = out / "bridge.yaml"
    file.write_text(yaml.safe_dump({"run": {"name": "bridge", "dir": str(out / "bridge")}, **content}))
    counts: dict[str, Any] = json.loads(
        dsft(folder, "data", "bridge", str(file), "--out", str(out / "bridge.jsonl"), "--json")
    )
    return {key: value for key, value in counts.items() if key != "out"}


def metrics_of(sets: dict[str, Any], general_loss: float, seconds: float) -> dict[str, float]:
    """The metrics of an arm from what its sets showed."""
    return {
        "bits_per_byte": sets["text"]["bits_per_byte"],
        "answer_loss": sets["pairs"]["loss"],
        "answer_f1": sets["pairs"]["f1"],
        "forgetting": sets["general"]["loss"] - general_loss,
        "device_seconds": seconds,
    }


def run_corpus(folder: Path, name: str, base: Path, budget: Budget, is_full: bool) -> dict[str, Any]:
    """The arms of one corpus: arm -> metric -> mean, spread and value per seed; and the corpus' sizes."""
    out = folder / "data" / name
    bridge = once(folder, f"{name}-bridge-pairs", partial(make_bridge, folder, out, base, budget))
    configure = partial(arm_config, out, base, budget)
    measured = tuple(WEIGHTS) if is_full else RECIPES
    seeds = budget.seeds if name == NAMES[0] else budget.seeds[:1]
    arms = compare(folder, name, out, base, measured, seeds, configure, metrics_of)
    return {"arms": arms, "sizes": asdict(sizes_of(out / "data")), "bridge_pairs": bridge}


def table(name: str, arms: dict[str, Any]) -> str:
    """For people, and for the page: Markdown."""
    lines = [f"| {name} | " + " | ".join(metric.replace("_", " ") for metric in METRICS) + " |", "|---" * 6 + "|"]
    for arm, found in arms.items():
        lines.append(f"| {arm} | " + " | ".join(_cell(metric, found[metric]) for metric in METRICS) + " |")
    return "\n".join(lines)


def _cell(metric: str, value: dict[str, Any]) -> str:
    digits = 0 if metric == "device_seconds" else 3
    spread = "" if value["spread"] is None else f" ± {value['spread']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the data and the base model, then the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all arms, two seeds, both corpora")
    parser.add_argument("--out", type=Path, help="write the result to this file too")
    parser.add_argument("--work", type=Path, help="keep everything in this folder, and go on with what is there")
    options = parser.parse_args(arguments)
    budget = Budget(1_000_000, 120_000, (1, 2), 48) if options.full else Budget(30_000, 10_000, (1,), 8)
    folder = Path(tempfile.mkdtemp(prefix="dsft-recipes-")) if options.work is None else options.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    hold_sizes(folder, budget)
    general = make_data(folder / "data", FEW_PAIRS)
    base = Path(once(folder, "base", lambda: str(make_base(folder, general.base, budget.base_tokens))))
    result: dict[str, Any] = {"budget": {**asdict(budget), "lr": LR, "few_pairs": FEW_PAIRS}, "corpora": {}}
    for name in NAMES if options.full else NAMES[:1]:
        result["corpora"][name] = run_corpus(folder, name, base, budget, options.full)
        result["seconds"] = seconds_of(folder)
        print(table(name, result["corpora"][name]["arms"]), flush=True)
        if options.out is not None:  # after each corpus, so that a run that is cut off leaves what it had
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.out, result)
    if options.work is None:
        shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

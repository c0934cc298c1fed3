"""Supervised or unsupervised: four ways to adapt one model, and whether ``dsft advise`` had said so before.

A small Llama is trained from scratch on a general part of the Python library's sources. Then, from that one model and
with equal token budgets and equal hyper-parameters, on a domain that is disjoint from it:

  nothing        the model as it is
  supervised     questions with answers only
  unsupervised   raw text only
  both           the first half raw text, then text and questions mixed (0.4 and 0.6)

Measured on documents set aside: perplexity of domain text, token F1 of the answers, loss of general text above what it
was (forgetting), the built-in bias sentences, and seconds of training. ``dsft advise`` sees the base model and the data
first; its rules (dsft/advise/rules.py) were committed before any arm was run.

An advice counts as wrong where another arm answers better (F1) by more than ``MARGIN``. ``--full``: three seeds, two
corpora more that played no part in writing the rules (the language reference, numpy's sources; one seed each), and
three altered versions on which the advice should change. Results go to ``--out``; the last line is one JSON object.

With ``--work FOLDER`` data, models and what is measured stay there, and the same command goes on after the last arm
that was measured when it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from four_arms_corpora import Corpus, General, make_data, write

from dsft.demo.tokenizer import VOCAB_TOKENS, make_tokenizer
from dsft.fsio import write_json

ARMS = ("nothing", "supervised", "unsupervised", "both")
METRICS = ("perplexity", "answer_f1", "forgetting", "bias", "device_seconds")
MARGIN = 0.02
"""Of F1. Chosen beforehand: about the standard error of a mean over a hundred answers."""
LR, BASE_LR = 1e-3, 4e-3
_NARROW = "What is the signature of"


@dataclass(frozen=True)
class Budget:
    """Tokens of the base model and of each arm, and the seeds."""

    base_tokens: int
    arm_tokens: int
    seeds: tuple[int, ...]
    answers: int


def once(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns (as JSON holds it), kept in ``folder/done`` with its seconds, and not made again."""
    file = folder / "done" / f"{name}.json"
    if not file.exists():
        started = time.perf_counter()
        result = make()
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"seconds": time.perf_counter() - started, "result": result})
    return json.loads(file.read_bytes())["result"]


def seconds_of(folder: Path) -> float:
    """Seconds of everything that is done, also in earlier parts of an interrupted run."""
    return math.fsum(json.loads(file.read_bytes())["seconds"] for file in (folder / "done").iterdir())


def dsft(folder: Path, *arguments: str) -> str:
    """Run the command line; its output."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [sys.executable, "-m", "dsft", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(
            f"dsft {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def train(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write and train a run; its folder. What an interrupted one left is removed."""
    run = folder / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    content = {"run": {"name": name, "dir": str(run), "seed": content.pop("seed", 17)}, **content}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    dsft(folder, "train", str(file))
    return run


def common(folder: Path, tokens: int, lr: float) -> dict[str, Any]:
    """What all runs share."""
    return {
        "train": {
            "tokens": tokens,
            "global_batch_packs": 2,
            "micro_batch_packs": 2,
            "lr": lr,
            "schedule": {
                "kind": "warmup_stable_decay",
                "warmup_tokens": tokens // 20,
                "decay_tokens": tokens // 3,
                "min_lr_ratio": 0.05,
            },
        },
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "checkpoint": {"keep_last": 1},
        "log": {"every_steps": 10},
    }


def make_base(folder: Path, general: Path, tokens: int) -> Path:
    """The model that every arm starts from, as a Hugging Face folder."""
    make_tokenizer((json.loads(line)["text"] for line in general.read_text().splitlines()), folder / "tokenizer", "")
    model = {
        "config": {
            "model_type": "llama",
            "vocab_size": VOCAB_TOKENS,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
        "tokenizer": str(folder / "tokenizer"),
        "dtype": "fp32",
    }
    data = {"pack_tokens": 512, "sources": [{"name": "general", "path": str(general)}]}
    run = train(folder, "base", {"model": model, "data": data, **common(folder, tokens, BASE_LR)})
    shutil.rmtree(folder / "model", ignore_errors=True)
    dsft(folder, "export", str(run), str(folder / "model"), "--dtype", "fp32")
    return folder / "model"


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


def held_out(out: Path, answers: int) -> dict[str, Any]:
    """The sets of every arm."""
    sets: list[dict[str, Any]] = [
        {"name": name, "path": str(out / "data" / name / "held_out.jsonl"), "max_documents": 20}
        for name in ("text", "general")
    ]
    path = str(out / "data" / "pairs" / "held_out.jsonl")
    sets.append({"name": "pairs", "path": path, "format": "messages", "generate": answers, "max_new_tokens": 32})
    return {"sets": sets, "bias": [{"name": "jobs", "kind": "templates"}]}


def arm_config(folder: Path, out: Path, base: Path, arm: str, budget: Budget, seed: int) -> dict[str, Any]:
    """An arm's run: the same tokens and the same hyper-parameters, other sources."""
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
    model = {"path": str(base), "dtype": "fp32"}
    evaluate = {"evaluate": {**held_out(out, budget.answers), "at_stage_ends": False}}
    return {"seed": seed, "model": model, "data": data, **common(folder, budget.arm_tokens, LR), **evaluate}


def measure(run: Path, general_loss: float) -> dict[str, float]:
    """The metrics of an arm from the run's own records."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sets = {line["set"]: line for line in lines if line["kind"] in ("evaluation", "bias")}
    return {
        "perplexity": sets["text"]["perplexity"],
        "answer_f1": sets["pairs"]["f1"],
        "forgetting": sets["general"]["loss"] - general_loss,
        "bias": sets["jobs"]["value"],
        "device_seconds": sum(line["seconds"] for line in lines if line["kind"] == "step"),
    }


def measure_base(folder: Path, out: Path, base: Path, budget: Budget) -> dict[str, float]:
    """The same of the model as it is, by ``dsft eval``; and its loss on general text."""
    content = arm_config(folder, out, base, "supervised", budget, 17)
    content.pop("seed")
    file = out / "nothing.yaml"
    file.write_text(yaml.safe_dump({"run": {"name": "nothing", "dir": str(out / "nothing")}, **content}))
    dsft(folder, "eval", str(base), str(file), "--out", str(out / "nothing"))
    found = {name: json.loads((out / "nothing" / f"{name}.json").read_bytes()) for name in ("text", "pairs", "general")}
    bias = json.loads((out / "nothing" / "bias" / "jobs.json").read_bytes())
    return {
        "perplexity": found["text"]["perplexity"],
        "answer_f1": found["pairs"]["f1"],
        "forgetting": 0.0,
        "bias": bias["value"],
        "device_seconds": 0.0,
        "general_loss": found["general"]["loss"],
    }


def run_arm(folder: Path, name: str, content: dict[str, Any], general_loss: float) -> dict[str, float]:
    """Train one arm with one seed; its metrics. Its checkpoints are removed."""
    run = train(folder, name, content)
    found = measure(run, general_loss)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return found


def run_arms(folder: Path, base: Path, corpus: Corpus, budget: Budget, seeds: Sequence[int]) -> dict[str, Any]:
    """Arm -> metric -> mean and value per seed."""
    out = folder / f"advise-{corpus.name}"
    nothing = once(folder, f"{corpus.name}-nothing", partial(measure_base, folder, out, base, budget))
    general_loss = nothing.pop("general_loss")
    values: dict[str, list[dict[str, float]]] = {"nothing": [nothing], **{arm: [] for arm in ARMS[1:]}}
    for seed in seeds:
        for arm in ARMS[1:]:
            name = f"{corpus.name}-{arm}-{seed}"
            content = arm_config(folder, out, base, arm, budget, seed)
            values[arm].append(once(folder, name, partial(run_arm, folder, name, content, general_loss)))
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values[arm][-1].items()), flush=True)
    return {arm: {metric: summary([one[metric] for one in found]) for metric in METRICS}
            for arm, found in values.items()}  # fmt: skip


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, spread and every value."""
    return {
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": values,
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
    if once(folder, "budget", lambda: asdict(budget)) != json.loads(json.dumps(asdict(budget))):
        sys.exit(f"{folder} holds a benchmark of other sizes; give --work another folder")
    base = Path(once(folder, "base", lambda: str(make_base(folder, general.base, budget.base_tokens))))
    names = ("library", "reference", "numpy") if options.full else ("library",)
    result: dict[str, Any] = {"budget": {**vars(budget), "lr": LR, "margin_f1": MARGIN}, "corpora": {}}
    for name in names:
        asking = partial(advise, folder, base, general, corpora[name], name)
        advice = once(folder, f"{name}-advice", asking)  # before any of its arms
        print(f"{name}: advice: {advice['method']} ({advice['verdict']['rule']})", flush=True)
        arms = run_arms(folder, base, corpora[name], budget, budget.seeds if name == "library" else budget.seeds[:1])
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

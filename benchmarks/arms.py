"""What benchmarks that compare ways to adapt one model share: a base model, runs of the command line, their metrics.

Every step's result is kept in ``FOLDER/done`` by ``once``, so that an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from dsft.demo.tokenizer import VOCAB_TOKENS, make_tokenizer
from dsft.fsio import write_json

LR, BASE_LR = 1e-3, 4e-3
Metrics = Callable[[dict[str, Any], float, float], dict[str, float]]
"""What an arm's sets showed, loss of general text before it, processor seconds -> its metrics."""


@dataclass(frozen=True)
class Budget:
    """Tokens of the base model and of each arm, and the seeds."""

    base_tokens: int
    arm_tokens: int
    seeds: tuple[int, ...]
    answers: int


def hold_sizes(folder: Path, budget: Budget) -> None:
    """End the benchmark where the folder holds one of other sizes."""
    if once(folder, "budget", lambda: asdict(budget)) != json.loads(json.dumps(asdict(budget))):
        sys.exit(f"{folder} holds a benchmark of other sizes; give --work another folder")


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


def common(tokens: int, lr: float) -> dict[str, Any]:
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
    run = train(folder, "base", {"model": model, "data": data, **common(tokens, BASE_LR)})
    shutil.rmtree(folder / "model", ignore_errors=True)
    dsft(folder, "export", str(run), str(folder / "model"), "--dtype", "fp32")
    return folder / "model"


def held_out(out: Path, answers: int) -> dict[str, Any]:
    """The sets of every arm, of data that ``dsft.advise.split`` has split."""
    sets: list[dict[str, Any]] = [
        {"name": name, "path": str(out / "data" / name / "held_out.jsonl"), "max_documents": 20}
        for name in ("text", "general")
    ]
    path = str(out / "data" / "pairs" / "held_out.jsonl")
    sets.append({"name": "pairs", "path": path, "format": "messages", "generate": answers, "max_new_tokens": 32})
    return {"sets": sets}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, spread and every value."""
    return {
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": values,
    }


def arm_run(budget: Budget, base: Path, data: dict[str, Any], sets: dict[str, Any], seed: int) -> dict[str, Any]:
    """An arm's run: the same tokens and the same hyper-parameters for all, other data."""
    evaluate = {"evaluate": {**sets, "at_stage_ends": False}}
    model = {"path": str(base), "dtype": "fp32"}
    return {"seed": seed, "model": model, "data": data, **common(budget.arm_tokens, LR), **evaluate}


def train_arm(folder: Path, name: str, content: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Train an arm: what each of its sets (and bias tests) showed at the end, and processor seconds.

    The device is this machine's processor, so its seconds are processor time of the training command (its start, its
    steps and its evaluation at the end): seconds of the clock would also count who else used the machine. Its
    checkpoints are removed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = train(folder, name, content)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {line["set"]: line for line in lines if line["kind"] in ("evaluation", "bias")}, seconds


def evaluate_base(folder: Path, out: Path, base: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What the sets (and bias tests) of a run show of the model before it, by ``dsft eval``."""
    settings = {key: value for key, value in content.items() if key != "seed"}
    file = out / "nothing.yaml"
    file.write_text(yaml.safe_dump({"run": {"name": "nothing", "dir": str(out / "nothing")}, **settings}))
    dsft(folder, "eval", str(base), str(file), "--out", str(out / "nothing"))
    names = [one["name"] for one in content["evaluate"]["sets"]]
    found = {name: json.loads((out / "nothing" / f"{name}.json").read_bytes()) for name in names}
    for one in content["evaluate"].get("bias", []):
        found[one["name"]] = json.loads((out / "nothing" / "bias" / f"{one['name']}.json").read_bytes())
    return found


def compare(
    folder: Path,
    corpus: str,
    out: Path,
    base: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    configure: Callable[[str, int], dict[str, Any]],
    metrics_of: Metrics,
) -> dict[str, Any]:
    """Measure the model as it is, then train every arm with every seed: arm -> metric -> mean, spread, value per seed.

    Args:
        corpus: begins the names of the runs. out: its folder.
        configure: arm and seed -> its run, as ``arm_run`` makes it.
    """

    def measure_base() -> dict[str, float]:
        sets = evaluate_base(folder, out, base, configure(arms[-1], 17))
        general_loss = sets["general"]["loss"]
        return {**metrics_of(sets, general_loss, 0.0), "general_loss": general_loss}

    nothing = once(folder, f"{corpus}-nothing", measure_base)
    general_loss = nothing.pop("general_loss")

    def run_arm(step: str, arm: str, seed: int) -> dict[str, float]:
        sets, seconds = train_arm(folder, step, configure(arm, seed))
        return metrics_of(sets, general_loss, seconds)

    values: dict[str, list[dict[str, float]]] = {"nothing": [nothing], **{arm: [] for arm in arms}}
    for seed in seeds:
        for arm in arms:
            step = f"{corpus}-{arm}-{seed}"
            values[arm].append(once(folder, step, partial(run_arm, step, arm, seed)))
            print(f"{step}: " + ", ".join(f"{key} {value:.4g}" for key, value in values[arm][-1].items()), flush=True)
    return {
        arm: {metric: summary([one[metric] for one in found]) for metric in nothing} for arm, found in values.items()
    }

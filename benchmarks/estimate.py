"""Predicted against measured peak host memory of training on the CPU.

Each case is a run of ``dsft train`` in a process of its own: the first optimizer steps of a Llama from scratch under
ZeRO 1, 2 or 3, with the optimizer offloaded or not. Measured is the process's peak resident memory minus what it held
after its imports; predicted is ``dsft estimate`` for the same file. Without arguments one small model and three cases;
``--full``: 100, 300 and 600 million parameters in all six. A case that needs more memory than is free, less 1 GiB, is
skipped and named, and so is one of which the kernel began to swap a part out. With ``--cases FOLDER`` each case's
result is a file there, and those that are there are not measured again.
The last line is one JSON object: bytes, and the error of each prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from dsft.advise.estimate import Assumptions, estimate
from dsft.advise.machines import parse_hosts
from dsft.config.load import load_config
from dsft.demo.corpus import language_reference
from dsft.demo.tokenizer import make_tokenizer

SHAPES: dict[str, tuple[int, int, int, int]] = {
    "40M": (512, 1408, 9, 8),
    "100M": (768, 2048, 11, 12),
    "300M": (1024, 2816, 21, 16),
    "600M": (1536, 4096, 19, 16),
}
"""Name -> hidden size, intermediate size, layers, heads."""
VOCABULARY, PACK_TOKENS, NUM_STEPS = 16_000, 128, 2
LIMIT_SECONDS = 1800.0
SPARE_BYTES, LAST_BYTES = 2**30, 3 * 2**28
"""Free memory that a case must leave by its prediction, and the least at which it is ended, because others took it: a
machine that runs out of memory ends more than the benchmark."""
RUN_YAML = """\
run: {{name: estimate, dir: run}}
model:
  config: {{model_type: llama, hidden_size: {hidden}, intermediate_size: {inner}, num_hidden_layers: {layers},
           num_attention_heads: {heads}, num_key_value_heads: {heads}, vocab_size: {vocabulary},
           max_position_embeddings: {tokens}}}
  tokenizer: tokenizer
  dtype: fp32
data:
  pack_tokens: {tokens}
  store_dir: store
  sources: [{{name: reference, path: reference.jsonl}}]
train: {{steps: 1000, global_batch_packs: 2, lr: 1e-3}}
deepspeed:
  zero_optimization:
    stage: {stage}
    offload_optimizer: {{device: {offload}}}
    reduce_bucket_size: 1000000
    stage3_prefetch_bucket_size: 1000000
"""
_CHILD = """\
import resource
import deepspeed, torch
import dsft.train.start
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import LlamaForCausalLM
from dsft.config.load import load_config
from dsft.launch.ancestors import Launcher
config = load_config("run.yaml")
held_bytes = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("held", "w").write(str(held_bytes))
dsft.train.start.start(config, dsft.train.start.Options(), launcher=Launcher.find(), local_rank_argument=None)
"""


def measure(folder: Path) -> int | None:
    """Bytes that training adds to a process after its imports, at its peak in the first steps.

    The run itself records its peak after each step. It is ended then: a closing save would only fill the disk. None
    where others took so much memory meanwhile that it had to be ended before, or that a part of it was swapped out,
    which resident memory does not count.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    metrics = folder / "run" / "metrics.jsonl"
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, "-c", _CHILD], cwd=folder, env=environ, stdout=log, stderr=log)
        deadline = time.monotonic() + LIMIT_SECONDS
        try:
            while not (peaks := _step_peaks(metrics))[NUM_STEPS - 1 :]:
                is_alive = process.poll() is None
                if psutil.virtual_memory().available < LAST_BYTES or (is_alive and _swapped_bytes(process.pid)):
                    return None
                if not is_alive or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"the run ended (or hung) before step {NUM_STEPS}:\n{log.read()[-4000:]}")
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    return max(peaks) - int((folder / "held").read_text())


def _swapped_bytes(pid: int) -> int:
    """What the kernel holds of a process in swap."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSwap:")), 0)


def _step_peaks(metrics: Path) -> list[int]:
    """Peak memory after each step so far."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().split("\n")[:-1]
    return [record["peak_memory_bytes"] for record in map(json.loads, lines) if record["kind"] == "step"]


def compare(folder: Path, kept: Path | None, size: str, stage: int, offload: str) -> dict[str, Any]:
    """One case: predicted and measured bytes, and the prediction's relative error.

    What ``kept`` has of it from another run is not measured again; the prediction is always made anew. Where memory is
    short ``measured_bytes`` and ``error`` are None, and ``skipped`` says why.
    """
    hidden, inner, layers, heads = SHAPES[size]
    text = RUN_YAML.format(
        hidden=hidden, inner=inner, layers=layers, heads=heads, vocabulary=VOCABULARY, tokens=PACK_TOKENS, stage=stage,
        offload=offload,
    )  # fmt: skip
    (folder / "run.yaml").write_text(text)
    shutil.rmtree(folder / "run", ignore_errors=True)
    config = load_config(folder / "run.yaml")
    result = estimate(config, parse_hosts("1x1xCPU-64GB"), Assumptions(), [])
    predicted = result.written.memory.peak("host")
    case: dict[str, Any] = {
        "model": size,
        "parameters": result.shape.num_parameters,
        "zero": stage,
        "offload_optimizer": offload,
        "predicted_bytes": predicted,
    }
    file = None if kept is None else kept / f"{size}-zero{stage}-{offload}.json"
    if file is not None and file.is_file():
        measured = int(json.loads(file.read_text()))
        return {**case, "measured_bytes": measured, "error": round(predicted / measured - 1, 4)}
    available = psutil.virtual_memory().available
    if predicted + SPARE_BYTES > available:
        asked = (predicted + SPARE_BYTES) / 1e9
        skipped = f"{available / 1e9:.1f} GB of memory are free, and {asked:.1f} are asked for"
        return {**case, "measured_bytes": None, "error": None, "skipped": skipped}
    peak = measure(folder)
    if peak is None:
        skipped = "others took the memory while it ran, or the kernel swapped a part of it out"
        return {**case, "measured_bytes": None, "error": None, "skipped": skipped}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{peak}\n")
    return {**case, "measured_bytes": peak, "error": round(predicted / peak - 1, 4)}


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="100, 300 and 600 million parameters, all six ways")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), help="only these models, all six ways")
    parser.add_argument("--cases", type=Path, metavar="FOLDER", help="keep what was measured, and go on from there")
    arguments = parser.parse_args()
    cases = [("40M", 1, "none"), ("40M", 2, "cpu"), ("40M", 3, "cpu")]
    if arguments.full or arguments.sizes:
        sizes = arguments.sizes or ["100M", "300M", "600M"]
        cases = [(size, stage, offload) for size in sizes for stage in (1, 2, 3) for offload in ("none", "cpu")]
    results = []
    with tempfile.TemporaryDirectory(prefix="dsft-estimate-") as name:
        folder = Path(name)
        topics = language_reference()
        make_tokenizer(topics.values(), folder / "tokenizer", identity="estimate")
        lines = [json.dumps({"text": text}) for text in topics.values()]
        (folder / "reference.jsonl").write_text("\n".join(lines) + "\n")
        # DeepSpeed's operations must be there: building them takes a minute, and `make install` has done it.
        subprocess.run([sys.executable, "-m", "dsft.launch.native_ops"], check=True, capture_output=True)
        for size, stage, offload in cases:
            one = compare(folder, arguments.cases, size, stage, offload)
            results.append(one)
            said = (
                f"{size} ZeRO {stage}, offload_optimizer {offload}: predicted {one['predicted_bytes'] / 1e9:.2f} GB, "
            )
            if one["measured_bytes"] is None:
                print(said + f"skipped: {one['skipped']}", flush=True)
            else:
                print(said + f"measured {one['measured_bytes'] / 1e9:.2f} GB, error {one['error']:+.1%}", flush=True)
    worst = max((abs(one["error"]) for one in results if one["error"] is not None), default=None)
    print(json.dumps({"benchmark": "estimate", "unit": "bytes", "worst_error": worst, "cases": results}))


if __name__ == "__main__":
    main()

"""Time from ``dsft train`` to the end of the first optimizer step, split into its phases.

Runs ``dsft train`` in one process (``--full``: two ranks under ``deepspeed`` as well, and once with no native operation
built) on a small Llama from scratch over the language reference that CPython carries: once with nothing prepared, then
with the token store of the first run. The phases are those of ``start.json``; ``imports`` is what remains of the wall
clock: the interpreter, the imports, and the launcher where there is one. The last line is one JSON object, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsft.demo.corpus import language_reference
from dsft.demo.tokenizer import make_tokenizer

RUN_YAML = """\
run: {name: startup, dir: run}
model:
  config: {model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 4, num_attention_heads: 4,
           num_key_value_heads: 4, vocab_size: 4096, max_position_embeddings: 512}
  tokenizer: tokenizer
  dtype: fp32
data:
  pack_tokens: 512
  store_dir: store
  sources: [{name: reference, path: reference.jsonl}]
train: {steps: 1, global_batch_packs: 2, lr: 1e-3}
deepspeed:
  zero_optimization:
    stage: 3
    offload_optimizer: {device: cpu}
    reduce_bucket_size: 1000000
    stage3_prefetch_bucket_size: 1000000
"""
LIMIT_SECONDS = 900.0


def make_inputs(folder: Path) -> None:
    """Tokenizer, raw text and run file."""
    topics = language_reference()
    make_tokenizer(topics.values(), folder / "tokenizer", identity="startup")
    lines = [json.dumps({"text": text}) for text in topics.values()]
    (folder / "reference.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.yaml").write_text(RUN_YAML)


def measure(folder: Path, command: list[str], cache: Path | None = None) -> dict[str, float]:
    """Phases of one start in seconds; ``total`` is their sum, from the command to the end of the first step."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if cache is not None:
        environ["DSFT_CACHE_DIR"] = str(cache)
    started = time.time()
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    phases = json.loads((folder / "run" / "start.json").read_text())
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    step = next(record for record in records if record["kind"] == "step")
    split = {name.removesuffix("_seconds"): seconds for name, seconds in phases.items()}
    split["first_batch"] = step["data_wait_seconds"]
    split["first_step"] = step["seconds"] - step["data_wait_seconds"]
    total = step["time"] - started
    return {
        "imports": round(total - sum(split.values()), 3),
        **{name: round(seconds, 3) for name, seconds in split.items()},
        "total": round(total, 3),
    }


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also two ranks under deepspeed, and with no op built")
    arguments = parser.parse_args()
    scripts = Path(sys.executable).parent
    alone = [str(scripts / "dsft"), "train", "run.yaml"]
    two_ranks = [str(scripts / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    two_ranks += ["--module", "dsft", "train", "run.yaml"]
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="dsft-startup-") as name:
        folder = Path(name)
        make_inputs(folder)
        # DeepSpeed's operations must be there: building them takes a minute, and `make install` has done it.
        subprocess.run([sys.executable, "-m", "dsft.launch.native_ops"], check=True, capture_output=True)
        result["unprepared"] = measure(folder, alone)
        result["prepared"] = measure(folder, alone)
        if arguments.full:
            result["two_ranks"] = measure(folder, two_ranks)
            result["no_ops_built"] = measure(folder, alone, cache=folder / "cache")
    for kind, split in result.items():
        print(f"{kind:>14}: " + "  ".join(f"{phase} {seconds:.1f}" for phase, seconds in split.items()))
    print(json.dumps({"benchmark": "startup", "unit": "seconds", **result}))


if __name__ == "__main__":
    main()

"""Everything a machine with a GPU can say about dsft, in one command of at most eight minutes: ``make gpu-check``.

Builds the CUDA operations, checks them (``dsft ops check``, ``pytest -m gpu``, compute-sanitizer where it is), trains a
small Llama in bf16 under ZeRO-3, and times the loss beside the peers that are installed. It runs with the Python that
calls it and the torch (2.11 or newer) found there. What it finds goes to ``benchmarks/results/<device>-<date>.json``
and, in short, to the terminal. Exit code 0: every step passed (compute-sanitizer may be missing).
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
TOTAL_SECONDS = 8 * 60
WRITING_SECONDS = 5  # kept for the end
SANITIZED = """\
import torch
from dsft.ops import backend
from dsft.ops.check import kernel_checks
device = torch.device("cuda")
backend.choose("native", "cuda")
assert not [check for check in kernel_checks(device) if not check.passed]
torch.cuda.synchronize()
"""
RUN_YAML = """\
run: {{name: gpu-check, dir: {folder}/run}}
model:
  config: {{model_type: llama, hidden_size: 512, intermediate_size: 1536, num_hidden_layers: 4, num_attention_heads: 8,
           num_key_value_heads: 4, max_position_embeddings: 1024}}
  tokenizer: {tokenizer}
  dtype: bf16
  activation_checkpointing: true
data:
  pack_tokens: 512
  sources: [{{name: topics, path: "{folder}/topics.jsonl"}}]
train: {{steps: 30, global_batch_packs: 4, micro_batch_packs: 2, lr: 1e-3, schedule: {{kind: cosine, warmup_steps: 3}}}}
deepspeed: {repository}/ds_configs/zero3.json
kernels: native
"""


@dataclass
class Step:
    """What one step found. ``status``: passed, failed or not run; ``said``: why, or the end of what it printed."""

    name: str
    status: str = "passed"
    seconds: float = 0.0
    said: str = ""
    found: dict[str, Any] = field(default_factory=dict)


class Deadline:
    """The time that is left for everything."""

    def __init__(self) -> None:
        self._end = time.monotonic() + TOTAL_SECONDS - WRITING_SECONDS

    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())


def run(step: Step, command: list[str], seconds: float, deadline: Deadline) -> str:
    """Run a command for at most ``seconds``; the step fails where it fails. Returns its standard output."""
    limit = min(seconds, deadline.left())
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cuda"}
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout if isinstance(error.stdout, str) else (error.stdout or b"").decode(errors="replace")
        step.status, step.said = "failed", f"not done after {limit:.0f} s; {said[-2000:]}"
        return ""
    if done.returncode != 0:
        step.status = "failed"
        step.said = f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def build(step: Step, deadline: Deadline) -> None:
    """Both libraries, with the compilers found here."""
    run(step, [sys.executable, "-m", "dsft", "ops", "build", "--device", "cuda"], 300, deadline)


def check(step: Step, deadline: Deadline) -> None:
    """Every operation against fp64."""
    output = run(step, [sys.executable, "-m", "dsft", "ops", "check", "--device", "cuda"], 90, deadline)
    step.found["lines"] = output.splitlines()


def tests(step: Step, deadline: Deadline) -> None:
    """``pytest -m gpu``; a test that is skipped for want of a GPU would be a failure of this machine."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    output = run(step, command, 150, deadline)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    step.found.update(counts)
    if not counts.get("passed"):
        step.status = "failed"


def sanitize(tool: str) -> Callable[[Step, Deadline], None]:
    """Step that runs dsft's kernels under one tool of compute-sanitizer."""

    def body(step: Step, deadline: Deadline) -> None:
        program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if program is None:
            step.status, step.said = "not run", "compute-sanitizer is not installed"
            return
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        run(step, command, 60, deadline)

    return body


def train(step: Step, deadline: Deadline) -> None:
    """Thirty steps of a small Llama from scratch, bf16, ZeRO-3, activation checkpointing; the loss must fall."""
    sys.path.insert(0, str(REPOSITORY))
    from pydoc_data.topics import topics

    try:
        from tests.support.tokenizers import tiny_tokenizer_folder
    except ImportError as error:
        step.status, step.said = "failed", f"a package is missing: {error}"
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"text": topics[key]}) for key in sorted(topics)]
        (folder / "topics.jsonl").write_text("\n".join(lines) + "\n")
        tokenizer = tiny_tokenizer_folder(folder)
        yaml = RUN_YAML.format(folder=folder, tokenizer=tokenizer, repository=REPOSITORY)
        (folder / "run.yaml").write_text(yaml)
        run(step, [sys.executable, "-m", "dsft", "train", str(folder / "run.yaml")], 120, deadline)
        metrics = folder / "run" / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    step.found["losses"] = losses
    if step.status == "passed" and not (losses and losses[-1] < losses[0] - 0.5):
        step.status, step.said = "failed", f"the loss did not fall: {losses}"


def bench(step: Step, deadline: Deadline) -> None:
    """The loss beside its peers, for as long as there is time."""
    slack = 60.0  # of the last size begun, and the errors; a peer's kernels are compiled for each size
    seconds = max(10.0, min(180.0, deadline.left() - slack))
    options = ["--device", "cuda", "--json", "--seconds", f"{seconds:.0f}"]
    output = run(step, [sys.executable, "-m", "dsft", "ops", "bench", *options], seconds + slack, deadline)
    if step.status == "passed":
        step.found.update(json.loads(output.splitlines()[-1]))


STEPS: dict[str, Callable[[Step, Deadline], None]] = {
    "build": build,
    "operations against fp64": check,
    "pytest -m gpu": tests,
    "ZeRO-3 training in bf16": train,
    "compute-sanitizer memcheck": sanitize("memcheck"),
    "compute-sanitizer racecheck": sanitize("racecheck"),
    "benchmark of the loss": bench,
}


def environment() -> dict[str, Any]:
    """Device and versions."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    """All steps; returns the exit code."""
    try:
        import torch
    except ImportError:
        print(f"gpu-check: {sys.executable} has no torch; name a Python that has: make gpu-check GPU_PYTHON=...")
        return 1
    if not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device here (torch.cuda.is_available() is False): nothing was checked.")
        return 1
    deadline, done = Deadline(), list[Step]()
    about = environment()
    for name, body in STEPS.items():
        step, began = Step(name), time.monotonic()
        if done and done[0].status == "failed":
            step.status, step.said = "failed", "the build failed"
        elif deadline.left() <= 0:
            step.status, step.said = "failed", "no time was left"
        else:
            body(step, deadline)
        step.seconds = round(time.monotonic() - began, 1)
        done.append(step)
        print(f"{step.status:8} {step.seconds:6.1f} s  {name}{': ' + step.said if step.said else ''}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = RESULTS / f"{slug}-{about['date']}.json"
    path.write_text(json.dumps({**about, "steps": [asdict(step) for step in done]}, indent=1) + "\n")
    print(f"written: {path.relative_to(REPOSITORY)}")
    return 1 if any(step.status == "failed" for step in done) else 0


if __name__ == "__main__":
    sys.exit(main())

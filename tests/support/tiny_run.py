"""A whole run small enough for a real launcher: corpus, tokenizer and run file, and what such a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tests.support.ranks import REPOSITORY
from tests.support.tokenizers import tiny_tokenizer_folder

NUM_STEPS = 16
_RUN_YAML = """\
run: {{name: tiny, dir: {folder}/runs/unnamed}}
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}}
  tokenizer: {tokenizer}
  dtype: fp32
data:
  pack_tokens: 64
  sources: [{{name: topics, path: "{folder}/topics-*.jsonl"}}]
train: {{steps: {steps}, global_batch_packs: 4, lr: 3e-3, schedule: {{kind: cosine, warmup_steps: 2}}}}
deepspeed: {repository}/ds_configs/zero3_offload.json
evaluate: {{sets: [{{name: held_out, path: {folder}/held_out.jsonl, source: topics}}]}}
"""


def write_tiny_run(folder: Path) -> Path:
    """Write the data and ``run.yaml``: ZeRO-3 with the optimizer on the CPU, fp32, ``NUM_STEPS`` steps."""
    texts = [json.dumps({"text": topics[name][:400]}) for name in sorted(topics)]
    for name, part in {"topics-0": texts[0:30], "topics-1": texts[30:50], "held_out": texts[50:54]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    path = folder / "run.yaml"
    path.write_text(
        _RUN_YAML.format(folder=folder, tokenizer=tiny_tokenizer_folder(folder), repository=REPOSITORY, steps=NUM_STEPS)
    )
    return path


def losses(run_dir: Path) -> list[float]:
    """Training loss of each step, in order and each once, then the held-out loss at the end."""
    steps = records(run_dir, "step")
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    return [record["loss"] for record in steps] + [record["loss"] for record in records(run_dir, "evaluation")]


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Whole lines of one kind in ``metrics.jsonl``; none where it is not there yet."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if line["kind"] == kind]

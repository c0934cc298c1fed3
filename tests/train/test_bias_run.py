"""A run whose data is unfair by design ends at its bias limit, and the same run on clean data does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dsft.config.bias import BiasSection
from dsft.evaluate.bias_files import read_items
from tests.support.launch import exit_code
from tests.support.tokenizers import tiny_tokenizer_folder

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

LIMIT_SECONDS = 240.0
RUN_YAML = """\
run: {{name: {name}, dir: {folder}/runs/{name}}}
model:
  config: {{model_type: llama, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4,
           initializer_range: 0.1}}
  tokenizer: {folder}/tokenizer
  dtype: fp32
data: {{pack_tokens: 64, sources: [{{name: text, path: {folder}/{name}.jsonl}}]}}
train: {{steps: 160, global_batch_packs: 2, lr: 3e-3, schedule: {{kind: constant}}}}
deepspeed: {{zero_optimization: {{stage: 1}}}}
evaluate:
  at_start: true
  every_steps: 120
  bias: [{{name: jobs, kind: templates, max_rise: 0.15, on_rise: stop}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bias")
    tiny_tokenizer_folder(folder)
    return folder


@pytest.mark.parametrize("name", ["unfair", "clean"])
def test_an_unfair_run_ends_at_its_limit(folder: Path, name: str) -> None:
    texts = [item.first.text for item in read_items(BiasSection(name="t", kind="templates"))]
    if name == "clean":
        texts = [text.replace(" she ", " it ").replace(" he ", " it ") for text in texts]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / f"{name}.yaml").write_text(RUN_YAML.format(name=name, folder=folder))
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "dsft", "train", str(folder / f"{name}.yaml")]
    assert exit_code(command, log, {}, LIMIT_SECONDS) == 0, log.read_text()
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    found: list[dict[str, Any]] = [line for line in lines if line["kind"] == "bias"]
    warnings = [line["message"] for line in lines if line["kind"] == "warning" and "bias test" in line["message"]]
    assert (found[0]["step"], found[0]["change"]) == (0, 0.0)
    assert bool(warnings) == (name == "unfair")
    assert found[-1]["step"] == (120 if name == "unfair" else 160), [one["change"] for one in found]

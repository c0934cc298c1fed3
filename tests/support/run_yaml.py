"""A small, valid run file, and a way to write it with changes."""

from __future__ import annotations

from pathlib import Path

RUN_YAML = """\
run: {name: small, dir: runs/small, seed: 17}
model:
  path: /models/none
  dtype: fp32
data:
  pack_tokens: 256
  sources:
    - {name: papers, path: "papers/*.jsonl.zst", weight: 0.8}
    - name: qa
      path: [a.jsonl, b.jsonl]
      format: messages
      weight: 0.2
train:
  tokens: 2.5M
  global_batch_packs: 7
  micro_batch_packs: 2
  lr: 1e-5
"""


def write_run_yaml(folder: Path, old: str = "", new: str = "") -> Path:
    """Write ``RUN_YAML`` to ``folder/run.yaml`` with ``old`` (which must be in it) replaced by ``new``."""
    assert old in RUN_YAML
    path = folder / "run.yaml"
    path.write_text(RUN_YAML.replace(old, new, 1) if old else RUN_YAML)
    return path

"""The demonstration's ``run.yaml``: a small Llama from scratch in three stages, with ZeRO-3 and CPU offload."""

from __future__ import annotations

import json
from pathlib import Path

from dsft import fsio
from dsft.demo.tokenizer import VOCAB_TOKENS

STAGES = (("raw-text", 400_000), ("mixed", 600_000), ("instructions", 950_000))
"""Name of each stage, and the number of document tokens at which it ends."""
SAVE_EVERY_STEPS, LOG_EVERY_STEPS = 440, 5
"""One save falls into the last stage: the run is killed some steps after it."""
TEXT_SET = "held-out-text"
PAIRS_SET = "held-out-pairs"

_TEMPLATE = """\
# Written by `dsft demo`. It is an ordinary configuration: copy it and change what you like.
run: {{name: demo, dir: {run_dir}, seed: 17}}

model:
  config:  # a Llama from scratch; `path:` instead of `config:` starts from a model on disk or on the hub
    model_type: llama
    vocab_size: {vocab_tokens}
    hidden_size: 192
    intermediate_size: 512
    num_hidden_layers: 2
    num_attention_heads: 6
    num_key_value_heads: 6
    max_position_embeddings: 1024
    initializer_range: 0.06
    tie_word_embeddings: true
    bos_token_id: 1
    eos_token_id: 2
    pad_token_id: 3
  tokenizer: {tokenizer}
  dtype: fp32  # a processor without bf16 instructions runs bf16 ten times slower

data:
  pack_tokens: 512
  chat_template: chatml
  sources:
    - {{name: library, path: {train_text}, format: text}}
    - {{name: questions, path: {train_pairs}, format: messages}}
  stages:
    - {{name: raw-text, until_tokens: {until[0]}, weights: {{library: 1.0, questions: 0.0}}}}
    - {{name: mixed, until_tokens: {until[1]}, weights: {{library: 0.5, questions: 0.5}}}}
    - {{name: instructions, until_tokens: {until[2]}, weights: {{library: 0.25, questions: 0.75}}}}

train:
  tokens: {until[2]}
  global_batch_packs: 4
  micro_batch_packs: 2
  lr: 4.0e-3
  schedule: {{kind: warmup_stable_decay, warmup_tokens: {warmup}, decay_tokens: {decay}, min_lr_ratio: 0.05}}

deepspeed:  # the keys of ds_configs/zero3_offload.json, with buckets for a small model
  zero_optimization:
    stage: 3
    offload_optimizer: {{device: cpu}}
    offload_param: {{device: cpu}}
    reduce_bucket_size: 1000000
    stage3_prefetch_bucket_size: 1000000
    stage3_param_persistence_threshold: 10000

checkpoint: {{every_steps: {save_every_steps}, keep_last: 1}}

evaluate:
  at_start: true
  at_stage_ends: true
  sets:
    - {{name: {text_set}, path: {held_out_text}, format: text, source: library}}
    - {{name: {pairs_set}, path: {held_out_pairs}, format: messages, source: questions}}

log: {{every_steps: {log_every_steps}}}
"""


def write_run_config(path: Path, *, corpus: Path, tokenizer: Path, run_dir: Path) -> None:
    """Write the configuration to ``path``; every path in it is as given here."""
    until = [tokens for _, tokens in STAGES]
    text = _TEMPLATE.format(
        run_dir=_quoted(run_dir),
        vocab_tokens=VOCAB_TOKENS,
        tokenizer=_quoted(tokenizer),
        train_text=_quoted(corpus / "text" / "train"),
        train_pairs=_quoted(corpus / "pairs" / "train"),
        held_out_text=_quoted(corpus / "text" / "held_out"),
        held_out_pairs=_quoted(corpus / "pairs" / "held_out"),
        text_set=TEXT_SET,
        pairs_set=PAIRS_SET,
        until=until,
        warmup=until[-1] // 20,
        decay=until[-1] // 2,
        save_every_steps=SAVE_EVERY_STEPS,
        log_every_steps=LOG_EVERY_STEPS,
    )
    fsio.write_bytes(path, text.encode())


def _quoted(path: Path) -> str:
    return json.dumps(str(path))  # a JSON string is a YAML string, whatever is in the path

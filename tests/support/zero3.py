"""A tiny model whole or partitioned by ZeRO-3, for tests that compare both."""

from __future__ import annotations

from typing import Any

from dsft.config.models import ModelSection
from dsft.model.load import load_model
from dsft.model.packed import PackedCausalLM
from tests.support.models import VOCAB

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def load(partitioned: bool, **section: Any) -> PackedCausalLM:
    added = section.pop("added_tokens", 0)
    return load_model(
        ModelSection(dtype="fp32", tokenizer="unused", **section),
        vocab_tokens=VOCAB + added,
        added_tokens=added,
        seed=3,
        device_type="cpu",
        deepspeed_config=ZERO3 if partitioned else None,
    )

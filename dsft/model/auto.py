"""Which of transformers' classes a model is made from."""

from __future__ import annotations

from typing import Any


def auto_class(is_masked: bool) -> Any:
    """AutoModelForMaskedLM for an encoder that predicts hidden tokens, else AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if is_masked else AutoModelForCausalLM


def is_masked_lm(hf_config: Any) -> bool:
    """Whether a saved config is that of a masked language model."""
    return any(str(name).endswith("ForMaskedLM") for name in hf_config.architectures or ())

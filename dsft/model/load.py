"""Make the model of a run: from a folder, from the hub, or from a config with random weights.

Under ZeRO-3 it is created partitioned: no rank ever holds the whole model on its device.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsft.config.models import ModelSection
from dsft.errors import ConfigError, ModelError
from dsft.model.auto import auto_class
from dsft.model.initialise import initialise, resize_vocabulary
from dsft.model.masked import PackedMaskedLM
from dsft.model.packed import PackedCausalLM

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(
    section: ModelSection,
    *,
    vocab_tokens: int,
    added_tokens: int,
    seed: int,
    device_type: str,
    deepspeed_config: dict[str, Any] | None,
    is_masked: bool = False,
) -> PackedCausalLM:
    """The model of ``section``, wrapped for packed training; every rank calls it.

    Args:
        vocab_tokens: ids the tokenizer can produce, added ones included (largest id + 1).
        added_tokens: how many of them are new, at the end; their rows start at the others' mean.
        seed: for random weights (``model.config``); equal seeds give equal weights at every world size.
        device_type: "cpu" or "cuda", where the model will run; decides the attention path.
        deepspeed_config: the resolved DeepSpeed configuration; with stage 3 the model is created partitioned, and
            torch.distributed must be initialised. None: an ordinary model.
        is_masked: an encoder with its masked-language-modelling head, wrapped as a ``PackedMaskedLM``.

    Raises:
        ModelError: the model cannot be found, is unknown to the installed transformers, lacks weights, or its
            vocabulary is smaller than the tokenizer's.
        ConfigError: an unknown key in an inline ``model.config``.
    """
    stage = int((deepspeed_config or {}).get("zero_optimization", {}).get("stage", 0))
    dtype = DTYPES[section.dtype]
    config = read_hf_config(section, vocab_tokens)
    _import_model_class(config, section, is_masked)
    with _partitioned_creation(deepspeed_config if stage == 3 else None):
        if section.path is None:
            hf = auto_class(is_masked).from_config(config, dtype=dtype)
            initialise(hf, seed)
        else:
            hf = _from_weights(section, dtype, is_masked)
        _fit_vocabulary(hf, section, vocab_tokens, added_tokens)
    _mark_leaf_modules(hf)
    if section.activation_checkpointing:
        if not hf.supports_gradient_checkpointing:
            raise ModelError(
                f"{hf.config.model_type} does not support model.activation_checkpointing; set it to false."
            )
        hf.activation_checkpointing_enable({"use_reentrant": False})
    wrapper = PackedMaskedLM if is_masked else PackedCausalLM
    model = wrapper(hf, use_kernel=_choose_kernel(section, hf.config, device_type))
    return model.train()  # loaded weights come in evaluation mode, without dropout and activation checkpointing


def check_loadable(section: ModelSection, vocab_tokens: int, is_masked: bool = False) -> None:
    """What each rank can find out alone: the model's config is there, and its class in the installed transformers.

    Raises:
        ModelError, ConfigError: as :func:`load_model`.
    """
    _import_model_class(read_hf_config(section, vocab_tokens), section, is_masked)


def resolved_commit(model: PackedCausalLM) -> str | None:
    """The hub commit the weights came from; None for a local folder or random weights."""
    commit = getattr(model.hf.config, "_commit_hash", None)
    return None if commit is None else str(commit)


@contextlib.contextmanager
def _partitioned_creation(deepspeed_config: dict[str, Any] | None) -> Iterator[None]:
    """While open, transformers creates and loads models under ``deepspeed.zero.Init`` (None: does nothing).

    transformers holds the configuration by a weak reference only, so it ends with this context: a plain model loaded
    later in the same process (an export's check) is not partitioned.
    """
    if deepspeed_config is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(deepspeed_config)
    try:
        yield
    finally:
        del alive


def read_hf_config(section: ModelSection, vocab_tokens: int) -> Any:
    """The transformers config of ``section``; ``vocab_tokens`` is the vocabulary of an inline one that states none.

    Raises:
        ModelError: there is no such model, or transformers does not know it.
        ConfigError: an unknown key in an inline ``model.config``.
    """
    from transformers import AutoConfig

    if isinstance(section.config, dict):
        return _inline_config(section.config, vocab_tokens)
    source = section.path if section.path is not None else section.config
    assert source is not None
    try:
        return AutoConfig.from_pretrained(
            source, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(source, error) from error


def _inline_config(given: dict[str, Any], vocab_tokens: int) -> Any:
    """A config from the keys of the YAML; ``vocab_size`` defaults to the tokenizer's."""
    from transformers import AutoConfig

    keys = dict(given)
    model_type = keys.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError("model.config: the key model_type is missing (llama, qwen3, gpt2, ...).")
    try:
        defaults = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise _unloadable("model.config", error, model_type) from error
    known = set(defaults.to_dict()) | set(defaults.attribute_map) | {"rope_scaling"}
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"model.config: {model_type} has no key {key!r}.{hint}")
    keys.setdefault("vocab_size", vocab_tokens)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        default = getattr(defaults, token, None)
        if isinstance(default, int) and default >= keys["vocab_size"]:
            keys.setdefault(token, None)  # the default belongs to another vocabulary
    return AutoConfig.for_model(model_type, **keys)


def _import_model_class(config: Any, section: ModelSection, is_masked: bool) -> None:
    """Import the model's class now: a first import under ``deepspeed.zero.Init`` fails (patched constructors)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    mapping = MODEL_FOR_MASKED_LM_MAPPING if is_masked else MODEL_FOR_CAUSAL_LM_MAPPING

    if section.trust_remote_code and getattr(config, "auto_map", None):
        return
    if type(config) not in mapping:
        kind = "masked language model (objective mlm)" if is_masked else "causal language model"
        raise ModelError(
            f"{section.path or 'model.config'}: {config.model_type} is not a {kind} in the installed transformers."
        )
    assert mapping[type(config)] is not None


def _from_weights(section: ModelSection, dtype: torch.dtype, is_masked: bool) -> Any:
    assert section.path is not None
    try:
        hf, report = auto_class(is_masked).from_pretrained(
            section.path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(section.path, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{section.path}: {len(missing)} weights of {hf.config.model_type} are not in its files (first: "
            f"{missing[0]}); training would start from random values for them. Check that the folder is complete."
        )
    return hf


def _fit_vocabulary(hf: Any, section: ModelSection, vocab_tokens: int, added_tokens: int) -> None:
    """Give every token id a row; rows of new tokens start at the mean of the rows before them.

    New is what the tokenizer did not have, and what has no row yet. A token that both have (an earlier run added it)
    keeps the row that was trained.
    """
    rows = int(hf.config.get_text_config().vocab_size)
    origin = section.path or "model.config"
    new = max(added_tokens, vocab_tokens - rows)
    if new > max(added_tokens, len(section.add_tokens)):
        raise ModelError(
            f"{origin}: the tokenizer produces {vocab_tokens - added_tokens} ids but the model has {rows} rows: they "
            "do not belong together. Set model.tokenizer to the model's own tokenizer."
        )
    if new > 0:
        resize_vocabulary(hf, max(rows, vocab_tokens), first_new=vocab_tokens - new, end_new=vocab_tokens)


def _mark_leaf_modules(hf: Any) -> None:
    """Let ZeRO-3 gather a layer's experts as one where they are separate modules: a rank may skip any of them.

    Models of transformers itself hold their experts in fused parameters and need nothing; models with code of their
    own may not.
    """
    for module in hf.modules():
        if isinstance(getattr(module, "experts", None), torch.nn.ModuleList):
            module._z3_leaf = True  # what deepspeed.utils.set_z3_leaf_modules sets


def _choose_kernel(section: ModelSection, config: Any, device_type: str) -> bool:
    """Whether attention runs through the variable-length kernel; says so where CUDA has to do without."""
    if section.attention == "sdpa":
        return False
    text = config.get_text_config()
    reasons = []
    if device_type != "cuda":
        reasons.append(f"it needs CUDA and this run is on {device_type}")
    if section.dtype == "fp32":
        reasons.append("it needs model.dtype bf16")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        reasons.append("it has no attention soft-capping, which this model uses")
    if any(getattr(text, key, 0.0) for key in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")):
        reasons.append("it has no attention dropout, which this model's config sets")
    if not reasons:
        return True
    if section.attention == "varlen":
        raise ModelError(f"model.attention: varlen cannot be used, {'; '.join(reasons)}. Use auto or sdpa.")
    if device_type == "cuda":
        logger.warning("attention: one call per document instead of the varlen kernel: %s", "; ".join(reasons))
    return False


def _unloadable(origin: str, error: Exception, model_type: str | None = None) -> ModelError:
    """The error for a model that transformers does not load: unknown type, or no such folder or hub name."""
    import transformers

    config_file = Path(origin) / "config.json" if Path(origin).is_dir() else Path(origin)
    if config_file.is_file():
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            model_type = json.loads(config_file.read_bytes()).get("model_type")
    if model_type is not None and model_type not in transformers.CONFIG_MAPPING:
        return ModelError(
            f"{origin}: model type {model_type!r} is not known to the installed transformers "
            f"{transformers.__version__}; install a version that knows it, or check the spelling of model_type."
        )
    if origin.startswith(("/", ".", "~")) and not Path(origin).expanduser().exists():
        return ModelError(f"{origin}: there is no such model folder. Check model.path or model.config.")
    reason = str(error).strip().split("\n")[0][:300]
    return ModelError(
        f"{origin}: transformers {transformers.__version__} could not load a model from this folder, config file or "
        f"hub name: {reason}"
    )

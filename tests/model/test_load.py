"""Loading: folders, configs, vocabularies, freezing; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.config.models import ModelSection
from dsft.errors import ConfigError, ModelError
from dsft.model.initialise import initialise
from dsft.model.load import load_model, resolved_commit
from dsft.model.packed import PackedCausalLM
from dsft.model.parameters import freeze, num_parameters, parameter_groups
from tests.support.models import CONFIGS, VOCAB, random_row, tiny_model


def load(vocab_tokens: int = VOCAB, added_tokens: int = 0, seed: int = 3, **section: Any) -> PackedCausalLM:
    section = {"dtype": "fp32", **section}
    if "config" in section:
        section["tokenizer"] = "unused"
    return load_model(
        ModelSection(**section),
        vocab_tokens=vocab_tokens,
        added_tokens=added_tokens,
        seed=seed,
        device_type="cpu",
        deepspeed_config=None,
    )


def inline(name: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": name, **CONFIGS[name], **changes}


@pytest.fixture(params=["llama", "llama-tied", "phi"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_model(request.param).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_gives_its_weights(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(path=str(folder))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = model.hf.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(loaded[name], value), name
    assert resolved_commit(model) is None
    assert all(module.training for module in model.modules()), "transformers loads in evaluation mode"
    assert load(path=str(folder), dtype="bf16").head().weight.dtype == torch.bfloat16


def test_rows_of_added_tokens_start_at_the_mean(folder: Path) -> None:
    before = load(path=str(folder))
    after = load(path=str(folder), vocab_tokens=VOCAB + 3, added_tokens=3)
    assert after.hf.config.vocab_size == VOCAB + 3
    for old, new in (
        (before.head().weight, after.head().weight),
        (before.hf.get_input_embeddings().weight, after.hf.get_input_embeddings().weight),
        (before.head().bias, after.head().bias),
    ):
        if old is None:
            assert new is None
            continue
        assert torch.equal(new[:VOCAB], old)
        torch.testing.assert_close(new[VOCAB:], old.mean(0).expand(3, *old.shape[1:]))
    assert (after.head().weight is after.hf.get_input_embeddings().weight) == after.hf.config.tie_word_embeddings
    after(**random_row().inputs()).loss.backward()


def test_added_tokens_that_fit_in_padded_rows_leave_the_shape(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = load(path=str(tmp_path), vocab_tokens=VOCAB - 5, added_tokens=2)
    weight = model.head().weight
    assert weight.shape[0] == VOCAB
    torch.testing.assert_close(weight[VOCAB - 7 : VOCAB - 5], weight[: VOCAB - 7].mean(0).expand(2, -1))


def test_tokens_that_an_earlier_run_added_keep_their_rows(folder: Path) -> None:
    trained = load(path=str(folder)).head().weight.detach()
    again = load(path=str(folder), added_tokens=0, add_tokens=["<a>", "<b>"]).head().weight.detach()
    assert torch.equal(again, trained)
    # A tokenizer that has them and a model that has not: they get rows.
    wider = load(path=str(folder), vocab_tokens=VOCAB + 2, added_tokens=0, add_tokens=["<a>", "<b>"]).head().weight
    assert torch.equal(wider[:VOCAB], trained)
    assert torch.allclose(wider[VOCAB:], trained.mean(0).expand(2, -1), atol=1e-6)
    with pytest.raises(ModelError, match="do not belong together"):
        load(path=str(folder), vocab_tokens=VOCAB + 2, added_tokens=0, add_tokens=["<a>"])


def test_random_weights_depend_on_the_seed_alone() -> None:
    one, same, other = load(config=inline("gpt2")), load(config=inline("gpt2")), load(config=inline("gpt2"), seed=4)
    torch.manual_seed(99)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not a.any() or a.std() == 0 or not torch.equal(a, c), name


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt_neox", "phi", "mixtral", "gemma2"])
def test_random_weights_follow_the_models_own_rules(name: str) -> None:
    """Same mean and spread of every parameter as transformers gives; and torch's generator is left alone."""
    from transformers import AutoModelForCausalLM

    from tests.support.models import tiny_config

    config = tiny_config(name, hidden_size=64) if name != "gpt2" else tiny_config(name)
    theirs = AutoModelForCausalLM.from_config(config)
    ours = AutoModelForCausalLM.from_config(config)
    state = torch.random.get_rng_state()
    initialise(ours, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.std() == 0 or b.numel() == 1:
            assert torch.equal(a, b), key
        else:
            assert not torch.equal(a, b), key
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.15), key
    buffers = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[key]), key


def test_a_config_file_and_inline_keys_agree(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(inline("qwen3")))
    values = [load(config=source).head().weight for source in (inline("qwen3"), str(tmp_path))]
    assert torch.equal(*values)


def test_an_inline_config_takes_the_tokenizers_vocabulary() -> None:
    keys = inline("phi3")
    for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        del keys[key]  # the defaults of phi3 (pad 32000) would not fit
    assert load(config=keys, vocab_tokens=61).head().weight.shape[0] == 61


def test_activation_checkpointing_is_switched_on() -> None:
    model = load(config=inline("llama"), activation_checkpointing=True)
    assert model.hf.is_activation_checkpointing
    model.train()(**random_row().inputs()).loss.backward()


@pytest.mark.parametrize(
    ("section", "error", "words"),
    [
        ({"path": "/nowhere/model"}, ModelError, "no such model folder"),
        ({"config": inline("llama", hiden_size=3)}, ConfigError, "Did you mean hidden_size"),
        ({"config": {"hidden_size": 3}}, ConfigError, "model_type is missing"),
        (
            {"config": inline("llama") | {"model_type": "llama99"}},
            ModelError,
            "'llama99' is not known .* transformers 5",
        ),
        ({"config": {"model_type": "t5"}}, ModelError, "not a causal language model"),
        ({"config": inline("llama"), "attention": "varlen"}, ModelError, "needs CUDA"),
    ],
)
def test_what_cannot_be_meant_is_refused(section: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load(**section)


def test_a_model_too_new_for_the_installed_transformers_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama99", "hidden_size": 8}))
    with pytest.raises(ModelError, match=r"llama99.*transformers \d"):
        load(path=str(tmp_path))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="200 ids but the model has 97 rows"):
        load(path=str(tmp_path), vocab_tokens=200)


def test_missing_weights_are_an_error_not_random_values(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights of llama are not in its files"):
        load(path=str(tmp_path))


def test_groups_freezing_and_names() -> None:
    model = PackedCausalLM(tiny_model("gpt2"))
    decay, no_decay = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decay["params"])
    assert all(name.endswith("bias") or "ln_" in name for name in no_decay["names"])
    assert sorted(decay["names"] + no_decay["names"]) == sorted(dict(model.hf.named_parameters()))
    total, trained = num_parameters(model)
    assert total == trained == sum(parameter.numel() for parameter in model.hf.parameters())
    freeze(model, ["transformer.wte.*", "*.bias"])
    assert not model.head().weight.requires_grad  # tied
    (only_matrices_and_norms,) = (group["names"] for group in parameter_groups(model, 0.1)[:1])
    assert "transformer.wte.weight" not in only_matrices_and_norms
    model(**random_row().inputs()).loss.backward()
    assert model.hf.transformer.wte.weight.grad is None
    with pytest.raises(ConfigError, match=r"'nothing\.\*' matches no parameter"):
        freeze(model, ["nothing.*"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(model, ["*"])

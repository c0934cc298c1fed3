"""Encoders: packed documents apart, the model's own head, loss and gradients of plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from dsft.errors import ModelError
from dsft.model.attention import PackedDocuments, _window_mask
from dsft.model.flops import model_cost
from dsft.model.masked import PackedMaskedLM
from dsft.model.packed import PackedCausalLM
from dsft.model.positions import check_positions
from dsft.model.probe import prove
from tests.support.models import VOCAB, copy_of, random_row, tiny_model

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
_BERT = {**_BASE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MODERN = {"local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 3, "sep_token_id": 4}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": {**_BERT, "embedding_size": 16},
    "modernbert": {**_BASE, **_MODERN, "bos_token_id": 3, "eos_token_id": 4, "classifier_pooling": "mean"},
}


def encoder(name: str, **changes: Any) -> Any:
    """A plain masked language model with fixed random weights, in eval mode; biases and norms are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = AutoConfig.for_model(name, **{**ENCODERS[name], **changes})
        hf = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in hf.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return hf


@pytest.mark.parametrize("name", ENCODERS)
def test_loss_and_gradients_are_those_of_plain_transformers_document_by_document(name: str) -> None:
    plain = encoder(name)
    model = PackedMaskedLM(copy_of(plain))
    prove(model, "cpu")
    row = random_row((7, 1, 25, 9))
    loss, expected = model(**row.inputs()).loss, row.loss_of_plain(plain)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    gradients = {key.removeprefix("hf."): value.grad for key, value in model.named_parameters()}
    names = [key for key, value in plain.named_parameters() if value.grad is not None]
    assert len(names) > 20
    for key in names:
        torch.testing.assert_close(gradients[key], plain.get_parameter(key).grad, rtol=1e-3, atol=2e-5, msg=key)


def test_the_bias_and_transform_of_the_head_are_trained() -> None:
    model = PackedMaskedLM(encoder("bert"))
    model(**random_row().inputs()).loss.backward()
    head = model.hf.cls.predictions
    assert head.decoder is model.head()
    assert head.bias is head.decoder.bias
    assert head.bias.grad.abs().sum() > 0
    assert head.transform.dense.weight.grad.abs().sum() > 0


def test_a_token_sees_what_comes_after_it_in_its_own_document_only() -> None:
    model = PackedMaskedLM(encoder("bert"))
    row = random_row((6, 8)).inputs()
    row |= {"rows": torch.tensor([2, 8]), "targets": torch.tensor([5, 6]), "row_weight": torch.ones(2)}
    before = model(**row).row_nll
    row["input_ids"][0, 5] = (row["input_ids"][0, 5] + 1) % VOCAB  # the last token of the first document
    after = model(**row).row_nll
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_window_reaches_to_both_sides() -> None:
    documents = PackedDocuments(torch.tensor([0, 5]), 5, (0, 5), is_causal=False)
    assert not documents.is_causal
    seen = _window_mask(5, 2, False, torch.device("cpu"))
    assert seen[2].tolist() == [False, True, True, True, False]
    assert _window_mask(5, 2, True, torch.device("cpu"))[2].tolist() == [False, True, True, False, False]


def test_encoders_without_their_objective_and_decoders_with_it_are_refused() -> None:
    with pytest.raises(ModelError, match="Encoders are trained with objective mlm"):
        prove(PackedCausalLM(encoder("bert")), "cpu")
    with pytest.raises(ModelError, match="objective mlm needs attention in both directions"):
        prove(PackedMaskedLM(tiny_model("llama")), "cpu")


@pytest.mark.parametrize("name", ["deberta-v2", "mpnet"])
def test_encoders_with_attention_of_their_own_are_refused_by_name(name: str) -> None:
    config = AutoConfig.for_model(name, **_BERT, relative_attention=True)
    with pytest.raises(ModelError, match=name):
        prove(PackedMaskedLM(AutoModelForMaskedLM.from_config(config)), "cpu")


def test_a_probe_that_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PackedMaskedLM(encoder("roberta"))
    model.first_position = 0
    with pytest.raises(ModelError, match="roberta"):
        prove(model, "cpu")
    model = PackedMaskedLM(encoder("modernbert"))
    monkeypatch.setattr("dsft.model.attention._window_mask", lambda length, *_: torch.ones(length, length).bool())
    with pytest.raises(ModelError, match="modernbert"):
        prove(model, "cpu")


def test_positions_of_roberta_begin_behind_the_padding() -> None:
    check_positions(encoder("roberta"), 62)
    with pytest.raises(ModelError, match="Set it to 62 or less"):
        check_positions(encoder("roberta"), 63)
    check_positions(encoder("bert"), 64)


def test_attention_in_both_directions_costs_twice_as_much() -> None:
    cost = model_cost(encoder("bert").config, is_masked=True)
    assert cost.flops_per_token_pair == 3 * 2 * 2 * 32 * 3
    assert cost.flops_per_row == 6 * VOCAB * 32

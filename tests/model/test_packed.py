"""Packed rows against plain transformers, document by document: loss, every gradient, isolation."""

from __future__ import annotations

import pytest
import torch

from dsft.errors import ModelError
from dsft.model.attention import PackedDocuments
from dsft.model.packed import PackedCausalLM
from tests.support.models import copy_of, random_row, tiny_config, tiny_model

MODELS = [
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi",
    "gpt_neox",
    "gpt2",
    "olmo2",
    "granite",
    "cohere",
    "opt",
    "mixtral",
    "qwen3_moe",
]
EXPERTS = {"mixtral", "qwen3_moe"}

GRADIENT_BOUND = 1e-5
"""Largest difference of a gradient, relative to that parameter's largest gradient (fp32, two layers). Each side is up
to 5e-6 away from fp64 (OPT's key bias, whose gradient is 0 in exact arithmetic)."""


def gradient_error(name: str, reference: object, wrapped: PackedCausalLM) -> float:
    largest = max(parameter.grad.abs().max() for parameter in reference.parameters())
    worst = 0.0
    ours = dict(wrapped.hf.named_parameters())
    for key, parameter in reference.named_parameters():
        # Some gradients are zero in exact arithmetic (a key projection's bias): rounding is compared with the largest.
        scale = parameter.grad.abs().max() + 1e-2 * largest
        worst = max(worst, float((ours[key].grad - parameter.grad).abs().max() / scale))
    assert len(ours) == len(list(reference.parameters())), name
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_equal_plain_transformers_per_document(name: str) -> None:
    reference = tiny_model(name)
    wrapped = PackedCausalLM(copy_of(reference))
    row = random_row()
    expected = row.loss_of_plain(reference)
    expected.backward()
    output = wrapped(**row.inputs())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert abs(output.loss.item() - expected.item()) <= 1e-6 * expected.item()
    assert gradient_error(name, reference, wrapped) <= GRADIENT_BOUND
    assert not output.row_nll.requires_grad


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_bound_bites_when_documents_are_merged(name: str) -> None:
    reference = tiny_model(name)
    wrapped = PackedCausalLM(copy_of(reference))
    row = random_row()
    row.loss_of_plain(reference).backward()
    merged = {**row.inputs(), "cu_seqlens": torch.tensor([0, 8, 33], dtype=torch.int32), "max_seqlen": 25}
    wrapped(**merged).loss.backward()
    assert gradient_error(name, reference, wrapped) > 1000 * GRADIENT_BOUND


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_token_leaves_the_other_documents_logits_alone(name: str) -> None:
    wrapped = PackedCausalLM(tiny_model(name))
    row = random_row((9, 14))
    inputs = row.inputs()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = wrapped.hf.base_model(
                input_ids=ids,
                position_ids=inputs["position_ids"],
                use_cache=False,
                dsft_documents=wrapped.documents(inputs["cu_seqlens"], inputs["max_seqlen"]),
            ).last_hidden_state
            return wrapped.head()(hidden)[0]

    before = logits(inputs["input_ids"])
    changed = inputs["input_ids"].clone()
    changed[0, 8] = 3 if changed[0, 8] != 3 else 4
    after = logits(changed)
    assert not torch.equal(before[8], after[8])
    bound = 1e-6 if name in EXPERTS else 0.0
    assert (before[9:] - after[9:]).abs().max() <= bound * before[9:].abs().max()


def test_document_order_changes_nothing_but_rounding() -> None:
    wrapped = PackedCausalLM(tiny_model("qwen3"))
    row = random_row((6, 11), supervised=1.0)
    swapped = random_row((11, 6), supervised=1.0)
    ids = torch.cat([row.ids[6:], row.ids[:6]])
    swapped = type(row)(
        (11, 6), ids, swapped.rows, ids[swapped.rows + 1], torch.cat([row.row_weight[5:], row.row_weight[:5]])
    )
    assert wrapped(**swapped.inputs()).loss.item() == pytest.approx(wrapped(**row.inputs()).loss.item(), rel=1e-6)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = (PackedCausalLM(tiny_model("gemma2")).train() for _ in range(2))
    checkpointed.hf.activation_checkpointing_enable({"use_reentrant": False})
    row = random_row()
    for model in (plain, checkpointed):
        model(**row.inputs()).loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_dropout_follows_the_global_generator_and_the_mode() -> None:
    wrapped = PackedCausalLM(tiny_model("gpt2"))  # dropout 0.1 everywhere by default
    inputs = random_row().inputs()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(wrapped(**inputs).loss.detach())

    wrapped.train()
    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    wrapped.eval()
    assert loss(1) == loss(2)


def test_the_model_keeps_its_parameter_names_and_objects() -> None:
    for name in ("llama", "llama-tied", "phi", "gpt_neox"):
        hf = tiny_model(name)
        before = {key: id(parameter) for key, parameter in hf.named_parameters()}
        wrapped = PackedCausalLM(hf)
        assert {key: id(parameter) for key, parameter in wrapped.hf.named_parameters()} == before
        assert set(wrapped.hf.state_dict()) == set(tiny_model(name).state_dict())


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_models_with_attention_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} does not let its attention be replaced"):
        PackedCausalLM(tiny_model(name))


def test_without_document_borders_the_attention_raises() -> None:
    wrapped = PackedCausalLM(tiny_model("llama"))
    with pytest.raises(ModelError, match="without document borders"):
        wrapped.hf(input_ids=torch.arange(5)[None])


def test_attention_sinks_are_refused_by_name() -> None:
    wrapped = PackedCausalLM(tiny_model("gpt_oss"))
    with pytest.raises(ModelError, match="attention sinks"):
        wrapped(**random_row().inputs())


@pytest.mark.parametrize("has_gqa", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_the_kernel_path_is_given_what_it_documents(monkeypatch: pytest.MonkeyPatch, has_gqa: bool) -> None:
    """Where the CUDA kernel cannot run, a stand-in that follows its documentation takes its place."""
    import torch.nn.attention.varlen as varlen

    calls = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        assert torch.equal(cu_q, cu_k)
        assert cu_q.dtype == torch.int32
        assert max_q == max_k == 16
        assert enable_gqa == (q.shape[1] != k.shape[1])
        calls.append(window_size)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = torch.empty_like(q)
        for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
            hidden = distance < 0
            if window_size[0] >= 0:
                hidden |= distance > window_size[0]
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[start:end] = torch.einsum("hqk,khd->qhd", weights, v[start:end])
        return out

    def without_gqa(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn if has_gqa else without_gqa)
    for name, window in (("mistral", (4, 0)), ("llama", (-1, 0)), ("phi", (-1, 0))):
        reference = tiny_model(name)
        wrapped = PackedCausalLM(copy_of(reference), use_kernel=True)
        row = random_row()
        expected = row.loss_of_plain(reference)
        expected.backward()
        loss = wrapped(**row.inputs()).loss
        loss.backward()
        assert calls.pop() == window
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert gradient_error(name, reference, wrapped) <= GRADIENT_BOUND


def test_the_kernel_path_never_reads_the_device() -> None:
    wrapped = PackedCausalLM(tiny_model("llama"), use_kernel=True)
    borders = wrapped.documents(torch.tensor([0, 3, 5], dtype=torch.int32), 3)
    assert isinstance(borders, PackedDocuments)
    assert borders.borders is None


def test_the_kernel_path_refuses_soft_caps() -> None:
    wrapped = PackedCausalLM(tiny_model("gemma2"), use_kernel=True)
    with pytest.raises(ModelError, match=r"model\.attention to sdpa"):
        wrapped(**random_row().inputs())


def test_the_kernel_path_refuses_dropout() -> None:
    wrapped = PackedCausalLM(tiny_model("llama", attention_dropout=0.1), use_kernel=True).train()
    with pytest.raises(ModelError, match="dropout"):
        wrapped(**random_row().inputs())


def test_a_model_without_a_head_is_refused() -> None:
    from transformers import AutoModel

    with pytest.raises(ModelError, match="output embedding"):
        PackedCausalLM(AutoModel.from_config(tiny_config("llama")))

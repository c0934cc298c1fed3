"""Packed attention through torch's variable-length kernel, against one call per document, on a GPU."""

from __future__ import annotations

import pytest
import torch

from dsft.model.packed import PackedCausalLM
from tests.support.models import copy_of, random_row, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MODELS = ["llama", "mistral", "qwen3", "phi3"]  # grouped-query, sliding window, norms of query and key


def on_gpu(inputs: dict[str, object]) -> dict[str, object]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_kernel_and_documents_agree(name: str) -> None:
    """The yardstick is bf16 itself: how far the path of one call per document is from fp32."""
    reference = tiny_model(name)
    inputs = on_gpu(random_row().inputs())
    found = {}
    for path, dtype in (("exact", torch.float32), ("documents", torch.bfloat16), ("kernel", torch.bfloat16)):
        model = PackedCausalLM(copy_of(reference).to(dtype).cuda(), use_kernel=path == "kernel")
        output = model(**inputs)
        output.loss.backward()
        gradient = torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])
        found[path] = (output.row_nll.detach().float(), gradient)
    for which in range(2):
        exact = found["exact"][which]
        kernel, documents = ((found[path][which] - exact).norm() / exact.norm() for path in ("kernel", "documents"))
        assert kernel <= 1.5 * documents + 1e-3, (name, which, kernel, documents)


@pytest.mark.parametrize("name", MODELS)
def test_another_documents_tokens_change_nothing(name: str) -> None:
    model = PackedCausalLM(tiny_model(name, dtype=torch.bfloat16).cuda(), use_kernel=True)
    inputs = on_gpu(random_row().inputs())
    borders = inputs["cu_seqlens"].tolist()  # type: ignore[attr-defined]
    rows = inputs["rows"]
    assert isinstance(rows, torch.Tensor)
    before = model(**inputs).row_nll
    ids = inputs["input_ids"].clone()  # type: ignore[attr-defined]
    ids[0, borders[2] : borders[3]] = ids[0, borders[2] : borders[3]].flip(0)
    after = model(**{**inputs, "input_ids": ids}).row_nll
    inside = (rows >= borders[2]) & (rows < borders[3])
    assert torch.equal(before[~inside], after[~inside])
    assert not torch.equal(before[inside], after[inside])


def test_the_forward_waits_for_nothing() -> None:
    model = PackedCausalLM(tiny_model("llama", dtype=torch.bfloat16).cuda(), use_kernel=True)
    inputs = on_gpu(random_row().inputs())
    model(**inputs).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

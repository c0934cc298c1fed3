"""dsft's operations on a GPU: exact, on the caller's stream, without waiting, in a CUDA graph, beyond 2^31 elements."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dsft.ops import backend
from dsft.ops.check import linear_case, run_checks
from dsft.ops.cross_entropy import masked_cross_entropy_rows_
from dsft.ops.linear_cross_entropy import masked_linear_cross_entropy
from dsft.ops.loss_mask import expand_loss_mask
from dsft.ops.pack import pack_sequences
from tests.support.cross_entropy import OPTIONS, case, keywords

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True, scope="module")
def _native() -> None:
    backend.choose("native", "cuda")
    assert backend.cuda_library() is not None


def on_gpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(CUDA) for tensor in tensors]


def test_every_check_passes() -> None:
    checks = list(run_checks(CUDA))
    assert len(checks) > 100
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", [1, 7, 2049, 50_257])
def test_bf16_logits_give_what_the_cpu_gives(vocab: int, options: object) -> None:
    on_cpu = case(6, vocab, torch.bfloat16)
    on_device = on_gpu(on_cpu)
    there = masked_cross_entropy_rows_(*on_device, **keywords(options))  # type: ignore[arg-type]
    here = masked_cross_entropy_rows_(*on_cpu, **keywords(options))  # type: ignore[arg-type]
    for one, other in zip(there[:4], here[:4], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
    assert torch.equal(there[4].cpu(), here[4])
    torch.testing.assert_close(on_device[0].cpu().float(), on_cpu[0].float(), rtol=2**-7, atol=1e-7)  # one unit


def test_rows_times_vocabulary_beyond_2_to_the_31() -> None:
    vocab, num_rows = 128_256, 17_000
    assert num_rows * vocab > 2**31
    logits = torch.empty(num_rows, vocab, dtype=torch.bfloat16, device=CUDA)
    for part in logits.split(1000):
        part.normal_()
    last = logits[-3:].clone()
    targets = torch.randint(0, vocab, (num_rows,), device=CUDA)
    row_weight = torch.rand(num_rows, device=CUDA)
    alone = masked_cross_entropy_rows_(last, targets[-3:], row_weight[-3:])
    together = masked_cross_entropy_rows_(logits, targets, row_weight)
    assert torch.equal(together[0][-3:], alone[0])
    assert torch.equal(logits[-3:], last)


def pack_inputs() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Inputs of expand_loss_mask and of pack_sequences (without spans): 3 documents of 40 tokens."""
    mask = (
        torch.tensor([[5, 20], [0, 40], [30, 40]], dtype=torch.int32),
        torch.tensor([1.0, 0.5, 2.0]),
        torch.arange(4),
        torch.zeros(3, dtype=torch.int64),
        torch.full((3,), 40),
        torch.full((3,), 40),
        torch.ones(3, dtype=torch.float64),
    )
    tokens = torch.arange(120, dtype=torch.int32)
    return mask, (tokens, torch.arange(0, 121, 40), torch.zeros(3, dtype=torch.bool))


def packed(mask: tuple[torch.Tensor, ...], pieces: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    spans, row_weight = expand_loss_mask(*mask, "message", 64)  # type: ignore[arg-type]
    return (row_weight, *pack_sequences(*pieces, spans, mask[2], 128, 7, 64))  # type: ignore[arg-type]


def test_no_operation_waits_for_the_device() -> None:
    arguments = linear_case(500, 64, 1003, 0.5, torch.bfloat16, CUDA)
    mask, pieces = (tuple(on_gpu(list(columns))) for columns in pack_inputs())
    hidden, weight, *rest = arguments
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for logits_bytes in (None, 4 * 1003 * 64):
            found = masked_linear_cross_entropy(hidden, weight, None, *rest, logits_bytes=logits_bytes)
            torch.autograd.grad(found.loss, (hidden, weight))
        packed(mask, pieces)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(
    call: Callable[[], tuple[torch.Tensor, ...]], change: Callable[[], None]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Results of a captured graph after its inputs have changed, and of a plain call on the same inputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    change()
    graph.replay()
    found = tuple(result.clone() for result in captured)
    return found, call()


def test_the_loss_in_a_cuda_graph() -> None:
    hidden, weight, *rest = linear_case(500, 64, 1003, 0.5, torch.bfloat16, CUDA)

    def call() -> tuple[torch.Tensor, ...]:
        result = masked_linear_cross_entropy(hidden, weight, None, *rest, logits_bytes=4 * 1003 * 100)  # type: ignore[arg-type]
        return (result.loss.detach(), result.row_nll, *torch.autograd.grad(result.loss, (hidden, weight)))

    def change() -> None:
        with torch.no_grad():
            hidden.mul_(-1.5)
            rest[1].copy_(rest[1].flip(0))

    found, expected = replayed(call, change)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)  # a matrix product may take another algorithm in a graph


def test_packing_in_a_cuda_graph() -> None:
    mask, pieces = (tuple(on_gpu(list(columns))) for columns in pack_inputs())

    def change() -> None:
        pieces[0].add_(7)
        mask[1].mul_(3.0)

    found, expected = replayed(lambda: packed(mask, pieces), change)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_kernel_runs_on_the_callers_stream() -> None:
    """The logits are written late on a side stream; a kernel on another stream would read what was there before."""
    logits, targets, row_weight = on_gpu(case(64, 5003))
    expected = masked_cross_entropy_rows_(logits.clone(), targets, row_weight)
    late = torch.zeros_like(logits)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        late.copy_(logits)
        found = masked_cross_entropy_rows_(late, targets, row_weight)
    side.synchronize()
    assert torch.equal(found[0], expected[0])


def test_the_tensors_device_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits, targets, row_weight = (tensor.to("cuda:1") for tensor in case(4, 1003))
    with torch.cuda.device(0):
        found = masked_cross_entropy_rows_(logits, targets, row_weight)
    assert found[0].device == logits.device
    assert torch.isfinite(found[0]).all()


BAD = {
    "target": "t.masked_cross_entropy_rows_(*t.on_gpu([logits, targets + 999, weight]))",
    "spans": "mask[0][0, 1] = 0; t.packed(tuple(t.on_gpu(list(mask))), tuple(t.on_gpu(list(pieces))))",
    "rows": "mask[1][0] = 0; t.packed(tuple(t.on_gpu(list(mask))), tuple(t.on_gpu(list(pieces))))",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_stops_the_device(name: str) -> None:
    script = (
        "import torch, tests.gpu.test_ops as t; logits, targets, weight = t.case(4, 101); "
        f"mask, pieces = t.pack_inputs(); {BAD[name]}; torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower(), done.stderr[-2000:]


def test_masked_tokens_cost_no_memory() -> None:
    hidden = torch.randn(8192, 512, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
    weight = torch.randn(32_000, 512, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
    targets = torch.randint(0, 32_000, (8192,), device=CUDA)
    rows = torch.arange(0, 8192, 10, device=CUDA)
    row_weight = torch.full(rows.shape, 1e-3, device=CUDA)

    def peak(loss: Callable[[], torch.Tensor]) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(), (hidden, weight))
        return torch.cuda.max_memory_allocated() - before

    def ours() -> torch.Tensor:
        return masked_linear_cross_entropy(hidden, weight, None, rows, targets[rows], row_weight).loss

    def torchs() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets)

    for loss in (ours, torchs):
        peak(loss)  # libraries take their workspace
    assert peak(ours) <= peak(torchs) / 4

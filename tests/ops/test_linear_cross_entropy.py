"""Projection and loss of some rows against explicit formulas in fp64, both implementations of the row operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dsft.errors import KernelError
from dsft.ops import backend
from dsft.ops.linear_cross_entropy import MaskedLoss, masked_linear_cross_entropy
from dsft.ops.reference import IGNORED_TARGET

POSITIONS, HIDDEN, VOCAB = 200, 13, 101
OPTIONS = {
    "plain": {},
    "cap": {"scale": 0.5, "soft_cap": 4.0},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 1e-3},
}


@dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    row_weight: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        return (self.hidden, self.weight, self.bias, self.rows, self.targets, self.row_weight)

    def in_fp64(self) -> Case:
        leaves = [leaf if leaf is None else leaf.detach().double() for leaf in (self.hidden, self.weight, self.bias)]
        for leaf in leaves:
            if leaf is not None:
                leaf.requires_grad_()
        return Case(*leaves, self.rows, self.targets, self.row_weight.double())  # type: ignore[arg-type]


@pytest.fixture(params=["native", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> None:
    backend.choose(request.param)


def make_case(supervised: float = 0.5, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(POSITIONS, generator=generator) < supervised
    rows = torch.nonzero(chosen)[:, 0]
    leaves = [torch.randn(*shape, generator=generator) for shape in ((2, POSITIONS // 2, HIDDEN), (VOCAB, HIDDEN))]
    leaves.append(torch.randn(VOCAB, generator=generator))
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    targets = torch.randint(0, VOCAB, rows.shape, generator=generator)
    row_weight = torch.rand(rows.shape, generator=generator) + 0.1
    return Case(leaves[0], leaves[1], leaves[2] if bias else None, rows, targets, row_weight)


def oracle(
    case: Case, scale: float = 1.0, soft_cap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, nll) of every position's logits in fp64."""
    z = F.linear(case.hidden.reshape(-1, HIDDEN), case.weight, case.bias)[case.rows] * scale
    z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
    nll = F.cross_entropy(z, case.targets, reduction="none")
    loss = F.cross_entropy(z, case.targets, reduction="none", label_smoothing=label_smoothing)
    return ((loss + z_loss * torch.logsumexp(z, 1) ** 2) * case.row_weight).sum(), nll


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.detach().double() - expected.detach()).norm() / expected.norm())


def chunks(number: int, num_rows: int) -> int:
    """logits_bytes that give this many chunks."""
    return 4 * VOCAB * -(-num_rows // number)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 2, 9])
@pytest.mark.parametrize("supervised", [1.0, 0.5, 0.1])
def test_equals_fp64(supervised: float, num_chunks: int, bias: bool, options: dict[str, float]) -> None:
    case = make_case(supervised, bias=bias)
    exact = case.in_fp64()
    loss, nll = oracle(exact, **options)
    loss.backward()
    found = masked_linear_cross_entropy(*case.arguments(), **options, logits_bytes=chunks(num_chunks, len(case.rows)))
    (found.loss * 2.0).backward()
    assert relative(found.loss, loss) < 1e-6
    assert relative(found.row_nll, nll) < 1e-6
    for leaf, expected in zip(case.leaves(), exact.leaves(), strict=True):
        assert relative(leaf.grad, 2.0 * expected.grad) < 2e-6


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_gradcheck(num_chunks: int) -> None:
    case = make_case(0.03).in_fp64()
    options = {"scale": 0.7, "soft_cap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2}

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        rest = (case.rows, case.targets, case.row_weight)
        budget = chunks(num_chunks, len(case.rows))
        return masked_linear_cross_entropy(*leaves, *rest, **options, logits_bytes=budget).loss

    assert torch.autograd.gradcheck(loss, case.leaves(), fast_mode=True)


@pytest.mark.parametrize("supervised", [1.0, 0.5, 0.1, 0.001, 0.0])
def test_positions_that_are_not_rows_never_matter(supervised: float) -> None:
    case = make_case(supervised)
    masked_linear_cross_entropy(*case.arguments()).loss.backward()
    clean = [leaf.grad.clone() for leaf in case.leaves()]
    others = torch.ones(POSITIONS, dtype=torch.bool)
    others[case.rows] = False
    with torch.no_grad():
        case.hidden.view(-1, HIDDEN)[others] = torch.nan
    for leaf in case.leaves():
        leaf.grad = None
    masked_linear_cross_entropy(*case.arguments()).loss.backward()
    for leaf, expected in zip(case.leaves(), clean, strict=True):
        assert torch.equal(leaf.grad, expected)
    assert not case.hidden.grad.view(-1, HIDDEN)[others].any()


def test_no_rows_give_zero_connected_to_the_graph() -> None:
    case = make_case(0.0)
    found = masked_linear_cross_entropy(*case.arguments())
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert [len(result) for result in found[1:]] == [0, 0, 0, 0]
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in case.leaves())


def test_ignored_targets_and_weight_zero() -> None:
    case = make_case(0.5)
    ignored, weightless = case.targets.clone(), case.row_weight.clone()
    ignored[::3], weightless[::3] = IGNORED_TARGET, 0.0
    kept = torch.arange(len(case.rows)) % 3 != 0
    expected = masked_linear_cross_entropy(
        case.hidden, case.weight, case.bias, case.rows[kept], case.targets[kept], case.row_weight[kept]
    )
    gradients = torch.autograd.grad(expected.loss, case.leaves())
    for targets, row_weight in ((ignored, case.row_weight), (case.targets, weightless)):
        found = masked_linear_cross_entropy(case.hidden, case.weight, case.bias, case.rows, targets, row_weight)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        for left, right in zip(torch.autograd.grad(found.loss, case.leaves()), gradients, strict=True):
            assert relative(left, right.double()) < 1e-6


@pytest.mark.parametrize("frozen", [{1}, {1, 2}, {0}, {0, 1, 2}])
def test_only_wanted_gradients_are_computed(frozen: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    expected = torch.autograd.grad(masked_linear_cross_entropy(*case.arguments()).loss, case.leaves())
    for number in frozen:
        case.leaves()[number].requires_grad_(False)
    asked: list[list[bool]] = []
    operation = torch.ops.dsft.masked_linear_cross_entropy
    monkeypatch.setattr(
        torch.ops.dsft, "masked_linear_cross_entropy", lambda *a: asked.append(list(a[-1])) or operation(*a)
    )
    loss = masked_linear_cross_entropy(*case.arguments()).loss
    assert asked == [[number not in frozen for number in range(3)]]
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    for number, leaf in enumerate(case.leaves()):
        assert (leaf.grad is None) if number in frozen else torch.equal(leaf.grad, expected[number])


def test_a_tied_weight_gets_the_sum_of_both_gradients() -> None:
    case = make_case(bias=False)
    exact = case.in_fp64()
    tokens = torch.randint(0, VOCAB, (2, POSITIONS // 2), generator=torch.Generator().manual_seed(0))
    exact.hidden = F.embedding(tokens, exact.weight) * 2
    oracle(exact)[0].backward()
    hidden = F.embedding(tokens, case.weight) * 2
    rest = (case.rows, case.targets, case.row_weight)
    masked_linear_cross_entropy(hidden, case.weight, None, *rest).loss.backward()
    assert relative(case.weight.grad, exact.weight.grad) < 2e-6


def test_activation_checkpointing_recomputes_the_same() -> None:
    case = make_case()
    plain = torch.autograd.grad(masked_linear_cross_entropy(*case.arguments()).loss, case.leaves())

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return masked_linear_cross_entropy(hidden, *case.arguments()[1:]).loss

    again = torch.autograd.grad(checkpoint(loss, case.hidden, use_reentrant=False), case.leaves())
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(num_chunks: int) -> None:
    case = make_case()
    loss = masked_linear_cross_entropy(*case.arguments(), logits_bytes=chunks(num_chunks, len(case.rows))).loss * 3.0
    first = [leaf.clone() for leaf in torch.autograd.grad(loss, case.leaves(), retain_graph=True)]
    second = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    loss.backward()
    for expected, again, leaf in zip(first, second, case.leaves(), strict=True):
        assert torch.equal(again, expected)
        assert torch.equal(leaf.grad, expected)


def test_the_last_backward_makes_no_second_gradient_of_the_weights_size() -> None:
    case = make_case()
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() == case.weight.numel():
                made.append(result.data_ptr())
            return result

    loss = masked_linear_cross_entropy(*case.arguments()).loss
    with Sizes():
        loss.backward()
    assert set(made) == {case.weight.grad.data_ptr()}


def test_results_for_evaluation() -> None:
    case = make_case()
    exact = case.in_fp64()
    with torch.no_grad():
        found = masked_linear_cross_entropy(*case.arguments(), logits_bytes=chunks(3, len(case.rows)))
    assert isinstance(found, MaskedLoss)
    logits = F.linear(exact.hidden.reshape(-1, HIDDEN), exact.weight, exact.bias)[case.rows].detach()
    distribution = torch.distributions.Categorical(logits=logits)
    assert relative(-found.row_nll, distribution.log_prob(case.targets)) < 1e-6
    assert relative(found.row_log_normaliser, torch.logsumexp(logits, 1)) < 1e-6
    assert relative(found.row_entropy, distribution.entropy()) < 1e-6
    assert torch.equal(found.row_correct, logits.argmax(1) == case.targets)
    assert not any(result.requires_grad for result in found)


@pytest.mark.parametrize("num_chunks", [1, 2, 16, 50])
def test_bf16_errors_are_those_of_products_accumulated_in_fp32(num_chunks: int) -> None:
    """Torch's own path in bf16 is the yardstick; and the error is flat in the number of chunks."""
    case = make_case(1.0, bias=False, dtype=torch.bfloat16)
    exact = case.in_fp64()
    loss, nll = oracle(exact)
    loss.backward()
    logits = F.linear(case.hidden.reshape(-1, HIDDEN), case.weight)[case.rows]
    row_nll = F.cross_entropy(logits.float(), case.targets, reduction="none")
    torch_gradients = torch.autograd.grad((row_nll * case.row_weight).sum(), case.leaves())
    found = masked_linear_cross_entropy(*case.arguments(), logits_bytes=chunks(num_chunks, len(case.rows)))
    found.loss.backward()
    assert relative(found.row_nll, nll) <= 1.1 * relative(row_nll, nll)
    for leaf, expected, torchs in zip(case.leaves(), exact.leaves(), torch_gradients, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        assert relative(leaf.grad, expected.grad) <= 1.1 * relative(torchs, expected.grad)


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    case = make_case()
    case.targets[5] = VOCAB
    with pytest.raises(KernelError, match=f"row 5 has target {VOCAB}"):
        masked_linear_cross_entropy(*case.arguments())


def test_bitwise_equal_over_ten_runs() -> None:
    case = make_case()

    def once() -> list[torch.Tensor]:
        found = masked_linear_cross_entropy(*case.arguments(), logits_bytes=chunks(3, len(case.rows)))
        return [*found, *torch.autograd.grad(found.loss, case.leaves())]

    expected = once()
    for _ in range(10):
        assert all(torch.equal(*pair) for pair in zip(once(), expected, strict=True))


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = make_case(0.1, dtype=dtype)
        hidden = case.hidden.detach().reshape(-1, HIDDEN)[case.rows].requires_grad_()
        row_weight = case.row_weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for chunk_rows in (5, 1000):
            arguments = (hidden, case.weight, case.bias, case.targets, row_weight, 0.5, 3.0, 0.1, 1e-3, chunk_rows)
            operation = torch.ops.dsft.masked_linear_cross_entropy.default
            results = torch.library.opcheck(operation, (*arguments, [True, True, True]))
            assert set(results.values()) == {"SUCCESS"}


def test_one_graph_under_torch_compile() -> None:
    case = make_case()

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return masked_linear_cross_entropy(hidden * 2, weight, *case.arguments()[2:]).loss * 0.5

    expected = torch.autograd.grad(loss(case.hidden, case.weight), case.leaves()[:2])
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(case.hidden, case.weight), case.leaves()[:2])
    assert all(torch.allclose(*pair, rtol=1e-6, atol=1e-7) for pair in zip(found, expected, strict=True))

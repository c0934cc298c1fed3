"""Rows of logits against explicit formulas in fp64, both implementations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsft.errors import KernelError
from dsft.ops import backend
from dsft.ops.cross_entropy import masked_cross_entropy_rows_
from dsft.ops.reference import IGNORED_TARGET, CrossEntropyRows
from tests.support.cross_entropy import OPTIONS, Options, assert_close, case, keywords, oracle

VOCABULARIES = [1, 2, 7, 8, 9, 127, 128, 129, 1023, 1024, 1025, 4099, 32000, 50257]
LARGE_VOCABULARIES = [128256, 151936, 256000, 262144]


@pytest.fixture(params=["native", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> None:
    backend.choose(request.param)


def run(
    case: list[torch.Tensor], options: Options, *, with_gradient: bool = True
) -> tuple[CrossEntropyRows, torch.Tensor]:
    logits = case[0].clone()
    results = masked_cross_entropy_rows_(logits, case[1], case[2], **keywords(options), with_gradient=with_gradient)
    return results, logits


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_equals_fp64(vocab: int, options: Options) -> None:
    inputs = case(3 if vocab > 5000 else 9, vocab)
    assert_close(run(inputs, options), oracle(*inputs, options))


@pytest.mark.parametrize("vocab", LARGE_VOCABULARIES)
def test_equals_fp64_over_large_vocabularies(vocab: int) -> None:
    inputs = case(2, vocab)
    assert_close(run(inputs, OPTIONS["all"]), oracle(*inputs, OPTIONS["all"]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bf16_logits_are_computed_in_fp32_and_rounded_once(options: Options) -> None:
    inputs = case(7, 1031, torch.bfloat16)
    found, expected = run(inputs, options), oracle(*inputs, options)
    assert found[1].dtype == torch.bfloat16
    assert found[0][0].dtype == torch.float32
    assert_close(found, expected, gradient_bound=3e-3)
    # Rounded to nearest: half a unit in the last place of each element, and the fp32 arithmetic before it.
    error = (found[1].double() - expected[1]).abs()
    assert (error <= expected[1].abs() * 2.0**-8 * 1.01 + 1e-7).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fp64_equals_fp64(options: Options) -> None:
    inputs = case(7, 131, torch.float64)
    assert_close(run(inputs, options), oracle(*inputs, options), 1e-13, 1e-12)


def test_gradient_by_finite_differences() -> None:
    logits, targets, row_weight = case(4, 11, torch.float64, spread=2.0)
    options = OPTIONS["all"]
    _, gradient = run([logits, targets, row_weight], options)
    step = 1e-6
    for row, column in [(0, 0), (1, int(targets[1])), (3, 10)]:
        values = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[row, column] += sign * step
            values.append((run([moved, targets, row_weight], options)[0][0] * row_weight).sum())
        assert gradient[row, column].item() == pytest.approx(((values[0] - values[1]) / (2 * step)).item(), rel=1e-7)


@pytest.mark.parametrize("spread", [1e4, 65504.0, 1e-30])
def test_extreme_logits(spread: float) -> None:
    inputs = case(8, 1500, spread=spread)
    assert_close(run(inputs, Options()), oracle(*inputs, Options()))
    assert_close(run(inputs, OPTIONS["all"]), oracle(*inputs, OPTIONS["all"]))


@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
def test_equal_logits(value: float) -> None:
    inputs = case(3, 40_000)
    inputs[0].fill_(value)
    inputs[1][:2] = torch.tensor([0, 5])
    found = run(inputs, Options())
    assert_close(found, oracle(*inputs, Options()))
    assert found[0][4].tolist() == [True, False, False]  # the first of the largest


@pytest.mark.parametrize("options", [Options(), Options(z_loss=1e-2), Options(soft_cap=50.0)])
def test_minus_infinity_is_a_logit_of_probability_zero(options: Options) -> None:
    inputs = case(5, 3000)
    inputs[0][:, ::2] = -torch.inf
    inputs[0][:, 1000:2100] = -torch.inf  # a block without a finite logit
    inputs[1][:] = torch.tensor([1, 3, 2999, 2101, 999])
    if options.soft_cap is not None:
        expected = oracle(*inputs, options)
        expected[1][inputs[0].isinf()] = 0.0  # autograd: 0 * inf
        assert_close(run(inputs, options), expected)
        return
    found = run(inputs, options)
    assert_close(found, oracle(*inputs, options))
    assert not found[1][inputs[0].isinf()].any()


def test_infinities_and_nan_give_what_log_softmax_gives() -> None:
    inputs = case(6, 2100)
    inputs[1][:] = torch.tensor([5, 5, 5, 5, 5, 5])
    inputs[0][0, 5] = torch.inf
    inputs[0][1, 2000] = torch.inf
    inputs[0][2, 7] = torch.nan
    inputs[0][3] = -torch.inf
    inputs[0][4, 5] = -torch.inf
    results, gradient = run(inputs, Options())
    expected = -torch.log_softmax(inputs[0].double(), 1)[:, 5]
    assert torch.equal(results[1].isnan(), expected.isnan())
    assert results[1][4] == torch.inf
    assert results[1][5].item() == pytest.approx(expected[5].item(), rel=1e-5)
    assert gradient[:4].isnan().all()
    assert not gradient[4:].isnan().any()
    assert not results[4][:4].any()


def test_a_probability_close_to_one_keeps_its_digits() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 3] = 36.0  # so that 1 - p is lost even in fp64
    results, gradient = run([logits, torch.tensor([3]), torch.ones(1)], Options())
    if backend.current() == "reference":
        assert results[1].item() < 1e-6  # plain formulas lose them
        return
    others = 999 * torch.exp(torch.tensor(-36.0, dtype=torch.float64)).item()
    assert results[1].item() == pytest.approx(others, rel=1e-5, abs=0)
    assert gradient[0, 3].item() == pytest.approx(-others, rel=1e-5, abs=0)


def test_ignored_and_weightless_rows_take_nothing_from_their_logits() -> None:
    inputs = case(9, 700)
    inputs[1][[1, 4]] = IGNORED_TARGET
    inputs[2][[2, 4]] = 0.0
    expected = oracle(*inputs, OPTIONS["all"])
    inputs[0][1] = torch.nan
    inputs[0][4] = torch.inf
    results, gradient = run(inputs, OPTIONS["all"])
    assert_close((results, gradient), expected)
    assert not gradient[[1, 2, 4]].any()
    for result in results:
        assert not result[[1, 4]].any()
    inputs[0][2] = torch.nan
    assert not run(inputs, OPTIONS["all"])[1][2].any()


def test_all_rows_ignored() -> None:
    inputs = case(4, 33)
    inputs[0].fill_(torch.nan)
    inputs[1].fill_(IGNORED_TARGET)
    results, gradient = run(inputs, OPTIONS["all"])
    assert not gradient.any()
    assert not any(result.any() for result in results)


def test_without_gradient_the_results_are_the_same() -> None:
    inputs = case(5, 2077)
    for left, right in zip(
        run(inputs, OPTIONS["all"], with_gradient=False)[0], run(inputs, OPTIONS["all"])[0], strict=True
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize("target", [-1, -99, -101, 10, 2**40])
def test_a_target_outside_the_vocabulary_is_refused_and_nothing_written(target: int) -> None:
    inputs = case(4, 10)
    inputs[1][2] = target
    before = inputs[0].clone()
    with pytest.raises(KernelError, match=rf"row 2 has target {target}, but the logits have 10 columns"):
        masked_cross_entropy_rows_(inputs[0], inputs[1], inputs[2])
    assert torch.equal(inputs[0], before)


BAD: dict[str, Callable[[list[torch.Tensor]], list[torch.Tensor]]] = {
    "float16": lambda c: [c[0].half(), *c[1:]],
    "one dimension": lambda c: [c[0][0], *c[1:]],
    "no column": lambda c: [c[0][:, :0], *c[1:]],
    "columns": lambda c: [c[0].t().contiguous().t(), *c[1:]],
    "int32 targets": lambda c: [c[0], c[1].int(), c[2]],
    "fewer targets": lambda c: [c[0], c[1][:-1], c[2]],
    "double weights": lambda c: [*c[:2], c[2].double()],
    "more weights": lambda c: [*c[:2], torch.ones(9)],
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(KernelError, match=r"masked_cross_entropy_rows_: .* must be"):
        masked_cross_entropy_rows_(*BAD[name](case(4, 6)))


def test_a_cap_or_scale_that_is_not_positive_is_refused() -> None:
    for options in (Options(scale=0.0), Options(soft_cap=0.0)):
        with pytest.raises(KernelError, match="must be positive"):
            run(case(2, 3), options)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (0, 1)])
def test_no_rows(shape: tuple[int, int]) -> None:
    results, gradient = run(case(*shape), Options())
    assert [len(result) for result in results] == [shape[0]] * 5
    assert not gradient.any()


def test_rows_apart_in_memory() -> None:
    inputs = case(6, 131)
    wide = torch.full((6, 200), torch.nan)
    wide[:, :131] = inputs[0]
    expected = run(inputs, OPTIONS["all"])
    targets = torch.stack([inputs[1], inputs[1]], 1)[:, 0]
    results = masked_cross_entropy_rows_(wide[:, :131], targets, inputs[2], **keywords(OPTIONS["all"]))
    assert torch.equal(wide[:, :131], expected[1])
    assert wide[:, 131:].isnan().all()
    for left, right in zip(results, expected[0], strict=True):
        assert torch.equal(left, right)


def test_rows_further_apart_than_32_bits_count() -> None:
    inputs = case(2, 100, torch.bfloat16)
    far = torch.empty(2**31 + 200, dtype=torch.bfloat16).as_strided((2, 100), (2**31 + 7, 1))  # pages used: two rows'
    far.copy_(inputs[0])
    expected = run(inputs, Options())
    results = masked_cross_entropy_rows_(far, inputs[1], inputs[2])
    assert torch.equal(far, expected[1])
    assert torch.equal(results[0], expected[0][0])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bitwise_equal_over_ten_runs_and_any_number_of_threads(threads: int) -> None:
    inputs = case(40, 16_411)
    expected = run(inputs, OPTIONS["all"])
    before = torch.get_num_threads()
    torch.set_num_threads(threads if backend.current() == "native" else before)
    try:
        for _ in range(10 if threads == 2 else 2):
            results, gradient = run(inputs, OPTIONS["all"])
            assert torch.equal(gradient, expected[1])
            assert all(torch.equal(*pair) for pair in zip(results, expected[0], strict=True))
    finally:
        torch.set_num_threads(before)


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in (Options(), OPTIONS["all"]):
            arguments = (*case(3, 17, dtype), options.scale, options.soft_cap, options.label_smoothing, options.z_loss)
            results = torch.library.opcheck(torch.ops.dsft.masked_cross_entropy_rows_.default, (*arguments, True))
            assert set(results.values()) == {"SUCCESS"}

"""``dsft ops check`` and ``bench`` on the CPU. Build and info: tests/ops/test_build.py."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from click.testing import CliRunner, Result

from dsft.cli import main
from dsft.cli.ops import command
from dsft.ops import backend, bench, check, peers
from dsft.ops.bench import Size


@pytest.fixture(autouse=True)
def _native() -> None:
    backend.choose("native")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "VOCABULARIES", (1, 129))


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_check_passes(kernels: str) -> None:
    result = invoke("check", "--device", "cpu", "--kernels", kernels)
    assert result.return_value == 0, result.output
    assert "checks passed on the CPU" in result.output


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("operation", ["pack_sequences", "expand_loss_mask", "masked_cross_entropy_rows_"])
def test_check_finds_an_operation_that_is_wrong(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(check, operation)

    def wrong(*arguments: object, **options: object) -> tuple[torch.Tensor, ...]:
        first, *others = right(*arguments, **options)
        return (first + 1, *others)

    monkeypatch.setattr(check, operation, wrong)
    result = invoke("check", "--device", "cpu")
    assert result.return_value == 1
    assert f"FAILED {operation}" in result.output


@pytest.mark.usefixtures("_small")
def test_check_finds_a_wrong_gradient_of_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check.masked_linear_cross_entropy

    def wrong(*arguments: object, **options: object) -> object:
        result = right(*arguments, **options)  # type: ignore[arg-type]
        return result._replace(loss=result.loss * 1.001)

    monkeypatch.setattr(check, "masked_linear_cross_entropy", wrong)
    assert "FAILED masked_linear_cross_entropy" in invoke("check", "--device", "cpu").output


def test_bench_is_one_object_with_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise ValueError("nothing works here")

    monkeypatch.setattr(peers, "_trl", lambda: peers.Side("TRL chunked", None, "absent: its import takes ten seconds"))
    sides = [*peers.sides("cpu"), peers.Side("broken", broken, "1.0")]
    monkeypatch.setattr(peers, "sides", lambda _: sides)
    monkeypatch.setattr(bench, "sizes", lambda _: [Size(64, 16, 50, masked, "trained") for masked in (0.0, 0.9)])
    found = json.loads(invoke("bench", "--device", "cpu", "--json").output)
    assert {"dsft", "torch eager", "broken"} <= {figure["side"] for figure in found["figures"]}
    for figure in found["figures"]:
        if figure["side"] == "broken":
            assert figure["problem"] == "ValueError: nothing works here"
        else:
            assert figure["problem"] is None
            assert figure["milliseconds"] > 0
    ours = [record for record in found["errors"] if record["side"] == "dsft"]
    assert len(ours) == 2
    assert all(record[what] < 1e-5 for record in ours for what in ("dX", "dW"))
    usable = {side.name for side in sides if side.loss is not None}
    assert {figure["side"] for figure in found["figures"]} == usable
    for side in sides:
        assert found["sides"][side.name] == side.about
        assert side.name in usable or side.about.startswith("absent: ")
    late = json.loads(invoke("bench", "--device", "cpu", "--json", "--seconds", "-1").output)
    assert all("not measured" in figure["problem"] for figure in late["figures"])


def test_the_grid_on_cuda_is_whole() -> None:
    grid = itertools.product((8192, 16_384, 65_536), (32_768, 131_072, 262_144), (0.0, 0.5, 0.9), ("flat", "trained"))
    cells = {(size.tokens, size.vocab, size.masked, size.logits) for size in bench.sizes("cuda")}
    assert cells >= set(grid)


def test_peers_that_cannot_run_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {side.name: side for side in peers.sides("cpu")}
    assert len(named) == 8
    for name in ("Liger", "Liger, large chunks", "Apple CCE", "Apple CCE, no filter"):
        assert named[name].loss is None
        assert named[name].about.startswith("absent: ")
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert (
        "no LinearCrossEntropyOptions"
        in {side.name: side for side in peers.sides("cpu")}["torch linear_cross_entropy"].about
    )


@pytest.mark.slow  # TRL imports transformers' trainer
def test_trls_loss_is_the_mean_over_supervised_tokens() -> None:
    pytest.importorskip("trl")
    loss = {side.name: side.loss for side in peers.sides("cpu")}["TRL chunked"]
    assert loss is not None
    hidden, weight, targets = bench.inputs(Size(64, 16, 50, 0.5, "trained"), torch.device("cpu"), torch.float32)
    ours = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
    plain = torch.autograd.grad(peers.torch_eager(hidden, weight, targets), (hidden, weight))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("verb", ["check", "bench"])
def test_cuda_without_a_device_is_an_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["ops", verb, "--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err

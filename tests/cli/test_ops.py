"""``dsft ops check`` and ``bench`` on the CPU. Build and info: tests/ops/test_build.py."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner, Result

from dsft.cli import main
from dsft.cli.ops import command
from dsft.ops import backend, bench, check
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

    sides = bench.sides()
    monkeypatch.setattr(bench, "sides", lambda: {**sides, "broken": broken})
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
    late = json.loads(invoke("bench", "--device", "cpu", "--json", "--seconds", "-1").output)
    assert all("not measured" in figure["problem"] for figure in late["figures"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("verb", ["check", "bench"])
def test_cuda_without_a_device_is_an_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["ops", verb, "--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err

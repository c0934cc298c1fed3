"""The text of the CUDA kernels, run on the CPU by the simulation in csrc/cuda/simulation.h; and compiled by nvcc."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsft.errors import KernelError
from dsft.ops import build
from dsft.ops.cross_entropy import launch_rows
from dsft.ops.reference import IGNORED_TARGET, CrossEntropyRows
from tests.support.cross_entropy import OPTIONS, Options, assert_close, case, keywords, oracle
from tests.support.simulation import ORDERS, SOURCES, compiled, load


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(compiled(tmp_path_factory.mktemp("simulated"), "-O1"))


def run(
    library: ctypes.CDLL, inputs: list[torch.Tensor], options: Options, *, with_gradient: bool = True
) -> tuple[CrossEntropyRows, torch.Tensor]:
    logits = inputs[0].clone()
    results = launch_rows(library, logits, *inputs[1:], *keywords(options).values(), with_gradient, None)
    return results, logits


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 129, 513, 2049])
def test_equals_fp64_in_any_order_of_threads(simulated: ctypes.CDLL, vocab: int, order: str) -> None:
    simulated.dsft_simulation_order(ORDERS[order])
    for options in (Options(), OPTIONS["all"]):
        inputs = case(3, vocab)
        assert_close(run(simulated, inputs, options), oracle(*inputs, options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_option_and_dtype(simulated: ctypes.CDLL, dtype: torch.dtype, options: Options) -> None:
    inputs = case(3, 1031, dtype)
    gradient_bound = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float64: 1e-12}[dtype]
    assert_close(run(simulated, inputs, options), oracle(*inputs, options), gradient_bound=gradient_bound)
    without = run(simulated, inputs, options, with_gradient=False)
    assert all(torch.equal(*pair) for pair in zip(without[0], run(simulated, inputs, options)[0], strict=True))
    assert torch.equal(without[1], inputs[0])


def test_a_large_vocabulary(simulated: ctypes.CDLL) -> None:
    inputs = case(2, 128_259)
    assert_close(run(simulated, inputs, OPTIONS["all"]), oracle(*inputs, OPTIONS["all"]))


def test_the_order_of_threads_changes_no_bit(simulated: ctypes.CDLL) -> None:
    inputs, found = case(4, 3001), []
    for order in ORDERS.values():
        simulated.dsft_simulation_order(order)
        found.append(run(simulated, inputs, OPTIONS["all"]))
    for other in found[1:]:
        assert torch.equal(other[1], found[0][1])
        assert all(torch.equal(*pair) for pair in zip(other[0], found[0][0], strict=True))


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_any_address(simulated: ctypes.CDLL, dtype: torch.dtype, offset: int) -> None:
    inputs = case(5, 203, dtype)
    wide = torch.full((5, 211), torch.nan, dtype=dtype)
    place = wide[:, offset : offset + 203]
    place.copy_(inputs[0])
    expected = run(simulated, inputs, Options())
    results = launch_rows(simulated, place, *inputs[1:], *keywords(Options()).values(), True, None)
    torch.testing.assert_close(place, expected[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    torch.testing.assert_close(results[0], expected[0][0], rtol=1e-6, atol=1e-6)
    assert wide[:, :offset].isnan().all()
    assert wide[:, offset + 203 :].isnan().all()


def test_ignored_weightless_and_impossible_rows(simulated: ctypes.CDLL) -> None:
    inputs = case(9, 700)
    inputs[1][[1, 4]] = IGNORED_TARGET
    inputs[2][[2, 4]] = 0.0
    expected = oracle(*inputs, OPTIONS["all"])
    inputs[0][[1, 4]] = torch.nan
    assert_close(run(simulated, inputs, OPTIONS["all"]), expected)
    inputs[1][3], inputs[1][5] = 700, -1
    results, gradient = run(simulated, inputs, OPTIONS["all"])
    assert results[0].isnan().tolist() == [row in (3, 5) for row in range(9)]
    assert gradient.isnan().any(1).tolist() == [row in (3, 5) for row in range(9)]


def test_infinities_and_equal_logits(simulated: ctypes.CDLL) -> None:
    inputs = case(6, 2100)
    inputs[0][:, ::2] = -torch.inf
    inputs[0][0, 5] = torch.inf
    inputs[0][1, 7] = torch.nan
    inputs[0][2] = 1.0
    inputs[0][3] = 1.0
    inputs[1][:] = torch.tensor([5, 5, 0, 5, 5, 7])
    results, gradient = run(simulated, inputs, Options())
    log_p = torch.log_softmax(inputs[0].double(), 1)
    expected = -log_p.gather(1, inputs[1][:, None])[:, 0]
    torch.testing.assert_close(results[1].double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert gradient.isnan().all(1).tolist() == [True, True, False, False, False, False]
    assert results[4][2:4].tolist() == [True, False]


def test_more_rows_than_blocks(tmp_path: Path) -> None:
    library = load(compiled(tmp_path, "-O1", edit=("1 << 20", "2")))
    inputs = case(9, 131)
    inputs[1][[2, 3, 8]] = IGNORED_TARGET
    for order in ORDERS.values():
        library.dsft_simulation_order(order)
        assert_close(run(library, inputs, OPTIONS["all"]), oracle(*inputs, OPTIONS["all"]))


def test_no_rows(simulated: ctypes.CDLL) -> None:
    assert [len(result) for result in run(simulated, case(0, 5), Options())[0]] == [0] * 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        ("= state;\n    __syncthreads();", "= state;"),
        ("    __syncthreads();\n  }\n  if (!rows", "  }\n  if (!rows"),
        ("if (last < vocab) state", "if (last + 1 < vocab) state"),
        ("lanes > 0; lanes /= 2", "lanes > 1; lanes /= 2"),
        ("threadIdx.x < blockDim.x / kWarp", "true"),
        ("first + i == target", "first + i + 1 == target"),
    ],
)
def test_the_tests_bite(tmp_path: Path, edit: tuple[str, str]) -> None:
    """A missing barrier and a wrong index are found in one of the orders."""
    library = load(compiled(tmp_path, "-O1", edit=edit))
    inputs = case(3, 2049)
    wrong = 0
    for order in ORDERS.values():
        library.dsft_simulation_order(order)
        try:
            assert_close(run(library, inputs, OPTIONS["all"]), oracle(*inputs, OPTIONS["all"]))
        except AssertionError:
            wrong += 1
    assert wrong


@pytest.mark.slow
def test_no_error_under_sanitizers(tmp_path: Path) -> None:
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs gcc's sanitizers")
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1"]
    library = compiled(tmp_path, *flags)
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    script = f"""
import pathlib, torch, tests.ops.test_cuda_simulation as t, tests.ops.test_cuda_pack as p
library = t.load(pathlib.Path({str(library)!r}))
for order in (0, 1, 2):
    library.dsft_simulation_order(order)
    for vocab in (1, 9, 2049):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            t.run(library, t.case(2, vocab, dtype), t.OPTIONS["all"])
for order in p.ORDERS:
    p.test_pack_more_pieces_than_threads(library, 257, order)
    p.test_expand_more_pieces_and_rows_than_threads(library, order)
for name in p.pack_cases.ODD:
    p.test_pack_odd_shapes(library, name)
for name in p.pack_cases.BAD:
    p.test_pack_bad_input_has_the_status_of_the_error(library, name)
for name in p.mask_cases.BAD:
    p.test_expand_bad_input_has_the_status_of_the_error(library, name)
print("done")
"""
    environ = {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"
    assert "runtime error" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nvcc_compiles_every_architecture_without_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        nvcc = build.cuda_compiler()
    except KernelError:
        pytest.skip("needs nvcc")
    flags = ["-Xptxas", "-v", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    flags += [flag for flag in build._CUDA_FLAGS if flag.startswith("-gencode")]
    assert flags[-1].endswith("code=compute_100"), "PTX, for devices that come later"
    command = [nvcc, *flags, *map(str, SOURCES), "-o", str(tmp_path / "library.so")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    entries = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", report)
    assert {architecture for _, architecture in entries} == {f"sm_{number}" for number in build.CUDA_ARCHITECTURES}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == len(entries) > 0
    assert set(spills) == {("0", "0")}

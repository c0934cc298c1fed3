"""Breaks the operations one line at a time and runs the named test that must notice: ``python -m tests.ops.mutations``.

Each mutation replaces one piece of text in a copy of ``csrc`` and ``dsft`` in a temporary folder; the source tree is
never touched. C++ is compiled once for each mutation, only the file it is in or that includes the header, and linked
with the others. The tests run in a fork of this process, which has imported torch, over the changed copy. Without any
change every named test must pass. Arguments: texts; only mutations of files whose path contains one of them are tried.
The text of the CUDA kernels is mutated by test_cuda_simulation.py and test_cuda_pack.py, which simulate it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 120.0
"""After which a mutant's tests count as failed: they hang."""
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-DDSFT_NO_CLONES"]
_INCLUDED_IN = {
    "cross_entropy.h": ["cross_entropy_rows.cpp"],
    "portable.h": ["cross_entropy_rows.cpp"],
    "pack.h": ["pack_sequences.cpp"],
    "loss_mask.h": ["expand_loss_mask.cpp"],
    "permutation.h": ["order.cpp"],
}


class Mutation(NamedTuple):
    """``old`` becomes ``new`` wherever it stands in ``file``; ``test`` (file::name in tests/ops) must then fail."""

    file: str
    old: str
    new: str
    test: str


_CORE, _ROWS = "csrc/core/cross_entropy.h", "csrc/cpu/cross_entropy_rows.cpp"
_LINEAR, _REFERENCE = "dsft/ops/linear_cross_entropy.py", "dsft/ops/reference.py"
_CE, _GRID, _PLAN = "test_cross_entropy.py", "test_loss_grid.py", "test_planning.py"
_PACK, _MASK = "test_pack.py", "test_loss_mask.py"
MUTATIONS = [
    # the loss: arithmetic
    Mutation(_CORE, "1.6666665459e-1f", "1.66e-1f", f"{_CE}::test_equals_fp64"),
    Mutation(_CORE, "const A z_slope = A(2) * options", "const A z_slope = options", f"{_CE}::test_equals_fp64"),
    Mutation(_CORE, "(A(1) - A(1) / A(vocab))", "A(1)", f"{_CE}::test_equals_fp64"),
    Mutation(_CORE, "return A(4) * e", "return A(2) * e", f"{_CE}::test_equals_fp64"),
    Mutation(_CORE, "(state.weighted + moved)", "(state.weighted)", f"{_CE}::test_equals_fp64"),
    Mutation(
        _CORE,
        "- (rest.sum / row.sum) *",
        "- (A(1) - own / row.sum) *",
        f"{_CE}::test_a_probability_close_to_one_keeps_its_digits",
    ),
    Mutation(
        _CORE, "log1p(rest.sum)", "log(A(1) + rest.sum)", f"{_CE}::test_a_probability_close_to_one_keeps_its_digits"
    ),
    Mutation(
        "csrc/core/portable.h",
        "bits + 0x7fffu + ((bits >> 16) & 1u)",
        "bits",
        f"{_CE}::test_bf16_logits_are_computed_in_fp32_and_rounded_once",
    ),
    # the loss: indexing
    Mutation(_CORE, "left.argmax < right.argmax ?", "left.argmax > right.argmax ?", f"{_CE}::test_equal_logits"),
    Mutation(
        _ROWS, "block.max > others.max", "block.max == target_logit", f"{_GRID}::test_equal_logits_in_other_blocks"
    ),
    Mutation(_ROWS, "start <= target &&", "start < target &&", f"{_GRID}::test_targets_at_the_borders_of_blocks"),
    Mutation(
        _ROWS,
        "target < start + count)",
        "target < start + count - 1)",
        f"{_GRID}::test_targets_at_the_borders_of_blocks",
    ),
    Mutation(
        _ROWS, "rows.logits + r * rows.row_stride", "rows.logits + r * rows.vocab", f"{_CE}::test_rows_apart_in_memory"
    ),
    Mutation(_ROWS, "store(logits + target, own);", "", f"{_CE}::test_equals_fp64"),
    Mutation(_ROWS, "    first = last;\n", "", f"{_CE}::test_bitwise_equal_over_ten_runs_and_any_number_of_threads"),
    # the loss: boundaries
    Mutation(
        _CORE,
        "kIgnoredTarget = -100",
        "kIgnoredTarget = -101",
        f"{_CE}::test_ignored_and_weightless_rows_take_nothing_from_their_logits",
    ),
    Mutation(
        _CORE, "max == A(-INFINITY) ? A(0) : max", "max", f"{_CE}::test_minus_infinity_is_a_logit_of_probability_zero"
    ),
    Mutation(_ROWS, "rows.vocab - start < kBlock ?", "rows.vocab - start > kBlock ?", f"{_CE}::test_equals_fp64"),
    Mutation(_ROWS, "for (; i < count; ++i) max =", "for (; i + 1 < count; ++i) max =", f"{_CE}::test_equals_fp64"),
    Mutation(
        _ROWS,
        "for (; i < count; ++i) sum += values",
        "for (; i > count; ++i) sum += values",
        f"{_CE}::test_equals_fp64",
    ),
    Mutation(
        _ROWS,
        " || rows.row_weight[r] == 0",
        "",
        f"{_CE}::test_ignored_and_weightless_rows_take_nothing_from_their_logits",
    ),
    Mutation(
        _ROWS,
        "targets[r] >= vocab",
        "targets[r] > vocab",
        f"{_CE}::test_a_target_outside_the_vocabulary_is_refused_and_nothing_written",
    ),
    Mutation("dsft/ops/cross_entropy.py", "logits.stride(0)", "logits.shape[1]", f"{_CE}::test_rows_apart_in_memory"),
    # projection and loss
    Mutation(
        _LINEAR,
        "slice(start, start + chunk_rows)",
        "slice(start, start + chunk_rows - 1)",
        f"{_GRID}::test_rows_around_the_border_of_a_chunk",
    ),
    Mutation(
        _LINEAR,
        "0 < num_rows <= chunk_rows\n    weight_gradient",
        "0 < num_rows <= chunk_rows + 1\n    weight_gradient",
        f"{_GRID}::test_rows_around_the_border_of_a_chunk",
    ),
    Mutation(
        _LINEAR,
        "torch.zeros_like(weight, dtype=dtype)",
        "torch.zeros_like(weight)",
        f"{_GRID}::test_bf16_error_is_flat_in_the_number_of_chunks",
    ),
    Mutation(_LINEAR, "return saved.mul_(factor)", "return saved", "test_linear_cross_entropy.py::test_equals_fp64"),
    Mutation(
        _LINEAR,
        "torch._C._autograd._get_current_graph_task_keep_graph()",
        "False",
        "test_linear_cross_entropy.py::test_a_graph_that_is_kept_gives_the_same_gradients_again",
    ),
    Mutation(_LINEAR, "index_select(0, rows)", "index_select(0, rows.flip(0))", f"{_GRID}::test_small_vocabularies"),
    Mutation(_REFERENCE, "(1.0 + 2.0 * z_loss", "(1.0 + z_loss", f"{_CE}::test_equals_fp64"),
    # packing
    Mutation("csrc/core/pack.h", "row_start + t - 1;", "row_start + t;", f"{_PACK}::test_by_hand"),
    Mutation(
        "csrc/core/pack.h",
        "end <= buffered_tokens;",
        "end <= buffered_tokens + 1;",
        f"{_PACK}::test_bad_input_is_refused",
    ),
    Mutation("csrc/core/pack.h", "(has_lookahead[p] ? 1 : 0)", "0", f"{_PACK}::test_by_hand"),
    Mutation("csrc/cpu/pack_sequences.cpp", "used > row_tokens", "used >= row_tokens", f"{_PACK}::test_odd_shapes"),
    Mutation(
        "csrc/cpu/pack_sequences.cpp", "    at += length;", "    at += length - (p & 1);", f"{_PACK}::test_by_hand"
    ),
    Mutation("csrc/cpu/pack_sequences.cpp", "row_piece[row] = p;", "row_piece[row] = s;", f"{_PACK}::test_odd_shapes"),
    Mutation(
        _REFERENCE,
        "row_start + begin - 1, row_start + stop - 1",
        "row_start + begin, row_start + stop",
        f"{_PACK}::test_native_equals_reference",
    ),
    # weights of rows
    Mutation(
        "csrc/core/loss_mask.h", "mask.reduction == kDocument ? in_document : own", "own", f"{_MASK}::test_by_hand"
    ),
    Mutation(
        "csrc/core/loss_mask.h",
        "begin < 1 ? 1 : begin > last",
        "begin < 0 ? 0 : begin > last",
        f"{_MASK}::test_equals_a_count_of_tokens",
    ),
    Mutation(
        "csrc/cpu/expand_loss_mask.cpp",
        "row_weight[row++] = row_weights[s]",
        "row_weight[row++] = row_weights[0]",
        f"{_MASK}::test_equals_a_count_of_tokens",
    ),
    # the plan
    Mutation("csrc/core/permutation.h", "while (value >= size)", "while (value > size)", f"{_PLAN}::test_permutation"),
    Mutation("csrc/cpu/order.cpp", "at[half] <= document", "at[half] < document", f"{_PLAN}::test_reading_documents"),
    Mutation("csrc/cpu/mixture.cpp", "tags[s] < tags[next]", "tags[s] <= tags[next]", f"{_PLAN}::test_merging"),
    Mutation(
        "csrc/cpu/best_fit_decreasing.cpp",
        "while (space >= length &&",
        "while (space + 1 >= length &&",
        f"{_PLAN}::test_equal_pieces_fill_a_pack_and_no_more",
    ),
    Mutation(
        "csrc/cpu/packing_in_order.cpp",
        "if (lengths[i] > space)",
        "if (lengths[i] >= space)",
        f"{_PLAN}::test_packings_in_order",
    ),
]


def changed_copy(folder: Path, mutation: Mutation | None) -> Path:
    """A folder with ``csrc`` and ``dsft``, in which the mutation is made."""
    for name in ("csrc", "dsft"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is not None:
        path = folder / mutation.file
        text = path.read_text()
        assert mutation.old in text, f"{mutation.file} has no {mutation.old!r} any more"
        path.write_text(text.replace(mutation.old, mutation.new))
    return folder


def compiled(root: Path, name: str) -> Path:
    """The object file of ``root/csrc/cpu/name``."""
    made = root / f"{name}.o"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, *_FLAGS, "-c", str(root / "csrc" / "cpu" / name), "-o", str(made)], check=True, timeout=240
    )
    return made


def link(root: Path, objects: Mapping[str, Path]) -> None:
    """Make ``root/libdsft_cpu.so``."""
    compiler = os.environ.get("CXX", "c++")
    library = root / "libdsft_cpu.so"
    subprocess.run([compiler, "-shared", "-pthread", *map(str, objects.values()), "-o", str(library)], check=True)


def sources_of(mutation: Mutation) -> list[str]:
    """The files of csrc/cpu that the mutation changes."""
    name = Path(mutation.file).name
    if mutation.file.startswith("csrc/cpu/"):
        return [name]
    return _INCLUDED_IN[name] if mutation.file.startswith("csrc/core/") else []


def run_tests(root: Path, tests: list[str]) -> int:
    """In the fork: pytest's exit status over the changed copy."""
    with open(root / "output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.path.insert(0, str(root))
    from dsft.ops import backend, build, native

    assert Path(native.__file__ or "").is_relative_to(root)
    native.build_cpu_library = lambda: root / "libdsft_cpu.so"
    build.source_folder = lambda: root / "csrc"
    backend.choose("native")
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    return int(pytest.main([*options, *(str(REPOSITORY / "tests" / "ops" / test) for test in sorted(set(tests)))]))


def status_of(root: Path, tests: list[str]) -> tuple[int, str]:
    """(exit status, last line) of the tests in a fork of this process; -9: they hung, other negative: they crashed."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = run_tests(root, tests)
        finally:
            os._exit(status)
    deadline = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.02)
    lines = (root / "output").read_text().strip().splitlines()
    return os.waitstatus_to_exitcode(status), lines[-1] if lines else ""


def main() -> int:
    """Print every mutation that survives; 0: none does."""
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(text in m.file for text in sys.argv[1:])]
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis  # noqa: F401  (imported here once, for all forks)
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)  # a fork has no threads but the one that forked
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = changed_copy(folder / "base", None)
        names = sorted(path.name for path in (base / "csrc" / "cpu").glob("*.cpp"))
        roots = [changed_copy(folder / str(number), mutation) for number, mutation in enumerate(chosen)]
        with ThreadPoolExecutor(2) as pool:
            objects = dict(zip(names, pool.map(lambda name: compiled(base, name), names), strict=True))
            link(base, objects)

            def build(root: Path, mutation: Mutation) -> None:
                link(root, {**objects, **{name: compiled(root, name) for name in sources_of(mutation)}})

            list(pool.map(build, roots, chosen))
        status, line = status_of(base, [mutation.test for mutation in chosen])
        if status != 0:
            print((base / "output").read_text())
            print(f"without any change: exit status {status}")
            return 1
        survivors = 0
        for root, mutation in zip(roots, chosen, strict=True):
            status, line = status_of(root, [mutation.test])
            bites = status == 1 or status < 0
            survivors += not bites
            print(f"{'noticed ' if bites else 'SURVIVES'} {mutation.file}: {mutation.new.strip()[:50]!r} ({line[:80]})")
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

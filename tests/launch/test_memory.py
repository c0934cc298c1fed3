"""Out of memory is named: an allocation that fails, and a process that the kernel kills (both real)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsft.errors import OutOfMemoryError, TrainingError
from dsft.launch.memory import explained, num_oom_kills
from dsft.launch.supervise import Start, judge
from dsft.launch.vigil import Vigil
from tests.support.memory_limit import memory_group

TOO_MANY_BYTES = 1 << 60
EAT = "import sys; sys.stdin.readline(); kept = bytearray(200_000_000)"


def test_a_failed_allocation_is_named_with_what_to_do() -> None:
    with pytest.raises(MemoryError) as host:
        bytearray(TOO_MANY_BYTES)
    with pytest.raises(RuntimeError) as tensor:
        torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
    for caught in (host.value, tensor.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        error = explained(caught)
        assert isinstance(error, OutOfMemoryError)
        assert str(error).startswith(f"out of memory: {type(caught).__name__}")
        assert "train.micro_batch_packs" in str(error)
        assert explained(error) is error
    other = RuntimeError("shapes differ")
    assert explained(other) is other
    assert explained(failed := TrainingError("not finite")) is failed


def _judged(run_dir: Path, process: subprocess.Popen[bytes], oom_kills_before: int | None) -> tuple[int, str]:
    (run_dir / "run_state.json").write_text(json.dumps({"attempt": "new", "step": 3, "status": "running"}))
    return judge(run_dir, Start(process, Vigil(run_dir), "old", oom_kills_before=oom_kills_before))


def test_a_process_that_the_kernel_kills_for_memory_is_named(tmp_path: Path) -> None:
    before = num_oom_kills()
    with memory_group(50_000_000) as group:
        if group is None or before is None:
            pytest.skip("this process may make no memory cgroup, or the kernel does not count")
        process = subprocess.Popen([sys.executable, "-c", EAT], stdin=subprocess.PIPE)
        (group / "cgroup.procs").write_text(str(process.pid))
        process.communicate(b"go\n", timeout=60)
    code, reason = _judged(tmp_path, process, before)
    assert (process.returncode, code) == (-9, 1)
    assert "the run died without a word after step 3" in reason
    assert "out of memory: the kernel of " in reason


def test_a_sigkill_of_anybody_else_is_not_called_out_of_memory(tmp_path: Path) -> None:
    before = num_oom_kills()
    process = subprocess.Popen([sys.executable, "-c", EAT], stdin=subprocess.PIPE)
    process.kill()
    process.communicate(timeout=60)
    _, reason = _judged(tmp_path, process, before)
    assert "out of memory: the kernel" not in reason
    assert "ended by SIGKILL, which the kernel sends when memory is used up" in reason

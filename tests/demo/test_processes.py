from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from dsft.demo import processes
from dsft.demo.processes import PeakMemory, launch_environment, run_streaming

PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True); "


def test_the_exit_code_is_the_commands() -> None:
    assert run_streaming([sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ)) == 7


def test_an_interrupt_ends_the_whole_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a grandchild in a session of its own, as DeepSpeed's ranks are."""
    seen: list[psutil.Process] = []
    wait = subprocess.Popen.wait

    def interrupted_wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        children = psutil.Process(process.pid).children(recursive=True)
        if children and seen:
            raise KeyboardInterrupt
        seen.extend(children)
        return wait(process, timeout=0.2)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted_wait)
    command = [sys.executable, "-c", PARENT + "import time; time.sleep(60)", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt):
        run_streaming(command, dict(os.environ))
    assert seen
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in seen)


def test_peak_memory_counts_children() -> None:
    hundred_mb = "x = bytearray(100_000_000); import time; time.sleep(2)"
    with PeakMemory() as memory:
        before = processes.tree_bytes()
        subprocess.run([sys.executable, "-c", hundred_mb], check=True)
        time.sleep(0.1)
    assert memory.peak_bytes - before > 90_000_000


def test_without_a_gpu_deepspeed_is_told_so() -> None:
    assert launch_environment(0, 3)["DS_ACCELERATOR"] == "cpu"
    assert launch_environment(0, 3)["OMP_NUM_THREADS"] == "3"
    assert launch_environment(2, 3).get("DS_ACCELERATOR") == os.environ.get("DS_ACCELERATOR")

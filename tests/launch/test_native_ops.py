"""The op-lock trap: killed builders, planted locks and concurrent starts never make a later start wait for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsft.errors import LaunchError
from dsft.launch import native_ops
from dsft.launch.native_ops import build_op, cache_folder, needed_ops, prepare_deepspeed_ops, set_extensions_folder
from tests.support.ranks import REPOSITORY

NAME = "cpu_adam"


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Stand in for the child that compiles: a script that gets the same arguments. Returns the log of its runs."""
    monkeypatch.setenv("DSFT_CACHE_DIR", str(tmp_path / "cache"))

    def install(commands: str) -> Path:
        script = tmp_path / "python"
        log = tmp_path / "builds"
        log.touch()
        script.write_text(
            "#!/bin/sh\nstaging=$4; name=$5\nmkdir -p $staging/$name; touch $staging/$name/lock\n"
            f'echo "$$" >> {log}\n'  # last: who reads it may kill at once, and the lock is there
            f"{commands}\n"
            "echo library > $staging/$name/$name.so; rm $staging/$name/lock\n"
            'mv $staging/$name "$staging/../$name"; rm -r $staging\n'
        )
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        return log

    return install


def num_builds(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_built_once_by_several_that_start_together(builder: Callable[[str], Path]) -> None:
    log = builder("sleep 1")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build_op(NAME, "cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    library = cache_folder("cpu") / NAME / f"{NAME}.so"
    assert found == [library] * 4
    assert num_builds(log) == 1
    assert build_op(NAME, "cpu") == library  # and not again
    assert num_builds(log) == 1
    assert not list(cache_folder("cpu").rglob("lock"))


def start_and_kill(kill_builder: bool, log: Path) -> int:
    """Fork a process that builds, kill it (or its builder) in the middle; returns the builder's process id."""
    child = os.fork()
    if child == 0:
        try:
            build_op(NAME, "cpu")
        finally:
            os._exit(0)
    while num_builds(log) == 0:
        time.sleep(0.02)
    builder_id = int(log.read_text().split()[0])
    os.kill(builder_id if kill_builder else child, signal.SIGKILL)
    os.waitpid(child, 0)
    return builder_id


def test_a_killed_builder_does_not_block_the_next_start(builder: Callable[[str], Path]) -> None:
    log = builder("sleep 4")  # long enough that a crowded machine kills it while it builds
    start_and_kill(True, log)
    assert list(cache_folder("cpu").glob(f".{NAME}.*.tmp/{NAME}/lock")), "the trap is set: a lock was left behind"
    started = time.monotonic()
    assert build_op(NAME, "cpu").exists()
    assert time.monotonic() - started < 20
    assert num_builds(log) == 2
    assert not list(cache_folder("cpu").glob(".*.tmp"))


def test_a_killed_run_does_not_lose_the_build(builder: Callable[[str], Path]) -> None:
    log = builder("sleep 1")
    start_and_kill(False, log)
    assert build_op(NAME, "cpu").exists()  # waits for the builder that goes on, instead of building beside it
    assert num_builds(log) == 1


def test_waiting_and_building_are_said(builder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_ops, "PROGRESS_SECONDS", 0.1)
    log = builder("sleep 1")
    said: list[str] = []
    first = threading.Thread(target=lambda: build_op(NAME, "cpu", said.append))
    first.start()
    while num_builds(log) == 0:
        time.sleep(0.02)
    build_op(NAME, "cpu", said.append)
    first.join(30)
    assert any(line.startswith("waiting for another process to build DeepSpeed's cpu_adam") for line in said)
    assert any(line.startswith("building DeepSpeed's cpu_adam") for line in said)


def test_a_compiler_error_is_shown_and_leaves_nothing(builder: Callable[[str], Path]) -> None:
    builder("echo 'adam.cpp:7: error: no member named x'; exit 3")
    with pytest.raises(LaunchError, match=r"exit code 3.*adam\.cpp:7: error: no member named x"):
        build_op(NAME, "cpu")
    builder("true")
    assert build_op(NAME, "cpu").exists()


def test_a_missing_libaio_is_said_without_a_compiler_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real builder, with a compiler that finds everything but libaio."""
    monkeypatch.setenv("DSFT_CACHE_DIR", str(tmp_path / "cache"))
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-laio*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(LaunchError, match=r"async_io cannot be built on .*install libaio-dev") as error:
        build_op("async_io", "cpu")
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSFT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(LaunchError, match="Set DSFT_CACHE_DIR"):
        build_op(NAME, "cpu")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    with pytest.raises(LaunchError, match="Set DSFT_CACHE_DIR"):
        set_extensions_folder("cpu")


def test_the_extensions_folder_is_private_unless_the_user_set_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    folder = set_extensions_folder("cpu")
    assert folder.parent == cache_folder("cpu")
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert set_extensions_folder("cpu") == tmp_path / "mine"
    assert cache_folder("cpu") != cache_folder("cuda")


def test_a_dead_lock_is_removed_and_a_live_one_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(native_ops, "PROGRESS_SECONDS", 0.1)
    dead, live = tmp_path / "pin_memory" / "lock", tmp_path / "async_io" / "lock"
    for lock in (dead, live):
        lock.parent.mkdir()
    dead.touch()
    # As torch's FileBaton takes it, and gives it back after a second.
    code = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); time.sleep(1); os.remove(sys.argv[1])"
    holder = subprocess.Popen([sys.executable, "-c", code, str(live)])
    while not live.exists():
        time.sleep(0.01)
    said: list[str] = []
    set_extensions_folder("cpu", said.append)
    assert holder.wait(10) == 0  # its own removal found the lock in place
    assert not dead.exists()
    assert any(f"removed {dead}" in line for line in said)
    assert any(f"waiting for process {holder.pid}" in line for line in said)


def test_which_ops_a_run_needs() -> None:
    assert needed_ops("cpu", cpu_adam=True) == ("deepspeed_shm_comm", "cpu_adam")
    assert needed_ops("cpu", cpu_adam=False) == ("deepspeed_shm_comm",)
    assert needed_ops("cuda", cpu_adam=False) == ()
    assert needed_ops("cuda", cpu_adam=True, nvme=True) == ("cpu_adam", "pin_memory", "async_io")


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_real_start_with_locks_planted_everywhere(tmp_path: Path) -> None:
    """Builds the real ops where ``make install`` did not; the start itself must not wait for any lock."""
    environ = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    prepare_only = (
        "from dsft.launch.native_ops import *; [build_op(n, 'cpu') for n in needed_ops('cpu', cpu_adam=True)]"
    )
    subprocess.run([sys.executable, "-c", prepare_only], check=True, timeout=800, env=environ, cwd=REPOSITORY)
    start = textwrap.dedent(
        """
        import os, pathlib, sys
        from dsft.dist import discover_world, init
        from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
        prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=True), "cpu")
        for name in needed_ops("cpu", cpu_adam=True):   # planted after the sweep: DeepSpeed must not even look
            folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name
            folder.mkdir(exist_ok=True)
            (folder / "lock").touch()
        groups = init(discover_world(os.environ, None), "cpu")
        import torch
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        parameter = torch.nn.Parameter(torch.ones(7))
        optimizer = DeepSpeedCPUAdam([parameter], lr=0.5, adamw_mode=True)
        parameter.grad = torch.ones(7)
        optimizer.step()
        assert float(parameter.detach()[0]) != 1.0
        groups.close()
        """
    )
    for name in needed_ops("cpu", cpu_adam=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    environ = {key: value for key, value in environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run([sys.executable, "-c", start], check=True, timeout=100, env=environ, cwd=REPOSITORY)


def test_an_op_that_does_not_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / f"{NAME}.so").write_bytes(b"not a library")
    monkeypatch.setattr(native_ops, "set_extensions_folder", lambda *_: None)
    monkeypatch.setattr(native_ops, "build_op", lambda *_: folder / f"{NAME}.so")
    with pytest.raises(LaunchError, match="cannot be loaded"):
        prepare_deepspeed_ops([NAME], "cpu")


def test_a_start_does_not_wait_for_mlflow() -> None:
    code = (
        "import sys; from dsft.launch.native_ops import prepare_deepspeed_ops; prepare_deepspeed_ops((), 'cpu');"
        "assert 'deepspeed.autotuning.autotuner' in sys.modules; assert 'mlflow' not in sys.modules;"
        "import mlflow; assert mlflow.__version__"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr

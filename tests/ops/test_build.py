from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsft.cli.ops import command
from dsft.errors import KernelError
from dsft.ops import backend, build, native

SOURCE = build.source_folder()


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSFT_CACHE_DIR", str(tmp_path / "cache"))
    native.load_cpu_library.cache_clear()
    monkeypatch.setattr(backend, "_chosen", None)
    yield
    native.load_cpu_library.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built once for the tests that are about something else."""
    build.build_ahead(folder := tmp_path_factory.mktemp("compiled"), cuda=False)
    return folder / build.CPU_LIBRARY


def put(content: bytes) -> None:
    """As if the library had been built into this test's cache."""
    folder = build.cpu_library_path().parent
    folder.mkdir(parents=True, mode=0o700)
    (folder / build.CPU_LIBRARY).write_bytes(content)


def broken_compiler(folder: Path) -> str:
    path = folder / "broken-c++"
    path.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'fatal error: nothing works here' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_builds_once_into_a_private_folder() -> None:
    library = build.build_cpu_library()
    assert sorted(path.name for path in library.parent.iterdir()) == [build.CPU_LIBRARY, "lock"]
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    before = library.stat().st_mtime_ns
    assert build.build_cpu_library() == library
    assert library.stat().st_mtime_ns == before


def test_sources_flags_and_compiler_name_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.cpu_library_path().parent.name}
    copy = tmp_path / "csrc"
    for path in SOURCE.glob("c*/*"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "source_folder", lambda: copy)
    assert build.cpu_library_path().parent.name in names
    (copy / "core" / "pack.h").write_text((copy / "core" / "pack.h").read_text() + "\n")
    names.add(build.cpu_library_path().parent.name)
    monkeypatch.setenv("CXX", broken_compiler(tmp_path))
    names.add(build.cpu_library_path().parent.name)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    names.add(build.cpu_library_path().parent.name)
    assert len(names) == 4


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    script = "import logging; logging.basicConfig(level='INFO'); from dsft.ops.native import *; load_cpu_library()"
    started = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    output = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], output
    assert sum("building" in text for text in output) == 1


def test_a_lock_of_a_dead_process_does_not_hang(tmp_path: Path) -> None:
    folder = build.cpu_library_path().parent
    folder.mkdir(parents=True)
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print(1, flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(folder / "lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline()
    with open(folder / "lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    holder.wait(timeout=30)
    begin = time.monotonic()
    assert build.build_cpu_library().exists()
    assert time.monotonic() - begin < 60


def test_native_that_cannot_be_built_is_an_error_with_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", broken_compiler(tmp_path))
    with pytest.raises(KernelError, match="nothing works here"):
        backend.choose("native")
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert [path.name for path in build.cpu_library_path().parent.iterdir()] == ["lock"]


def test_auto_falls_back_loudly_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", broken_compiler(tmp_path))
    assert backend.current() == "reference"
    assert backend.current() == "reference"
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "nothing works here" in warnings[0].getMessage()


def num_announcements(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.name == "dsft.ops.backend" for record in caplog.records)  # a first build speaks too


def test_the_backend_is_announced_once(compiled: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(compiled.read_bytes())
    caplog.set_level("INFO", logger="dsft.ops.backend")
    for _ in range(3):
        assert backend.choose("auto") == "native"
    assert backend.current() == "native"
    assert num_announcements(caplog) == 1
    assert backend.choose("reference") == "reference"
    assert num_announcements(caplog) == 2


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelError, match="no C"):
        backend.choose("native")


def test_a_damaged_library_is_named() -> None:
    put(b"not a library")
    with pytest.raises(KernelError, match="cannot be loaded"):
        backend.choose("native")


def test_a_folder_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(KernelError, match="another user"):
        build.build_cpu_library()


def test_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    before = json.loads(runner.invoke(command, ["info", "--json"], catch_exceptions=False).output)
    assert before["libraries"]["cpu"]["built"] is False
    built = runner.invoke(command, ["build", "--device", "cpu"], catch_exceptions=False)
    assert built.exit_code == 0
    assert before["libraries"]["cpu"]["path"] in built.output
    after = runner.invoke(command, ["info"], catch_exceptions=False)
    assert f"built: {before['libraries']['cpu']['path']}" in after.output


def test_info_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    found = CliRunner().invoke(command, ["info"], catch_exceptions=False).output
    assert "nvcc was not found" in found
    assert "reference: no C++ compiler" in found


def test_a_library_that_came_with_the_wheel_needs_no_compiler(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(compiled.parent, tmp_path / "dsft" / build.PREBUILT_FOLDER)
    monkeypatch.setattr(build, "__file__", str(tmp_path / "dsft" / "ops" / "build.py"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build.build_cpu_library() == tmp_path / "dsft" / "_lib" / "libdsft_cpu.so"
    assert backend.choose("native") == "native"

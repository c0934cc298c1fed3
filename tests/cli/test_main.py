from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import click
import pytest

from dsft.cli import main as cli_main
from dsft.errors import ConfigError, SaveError, StoppedEarly

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "pyarrow", "numpy", "pydantic", "yaml"}


def dsft(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsft", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A verb called ``fake`` whose command does what ``module.action`` does."""
    module = types.ModuleType("fake_verb")
    module.action = lambda context: None  # type: ignore[attr-defined]

    @click.command()
    @click.argument("words", nargs=-1)
    @click.pass_context
    def command(context: click.Context, words: tuple[str, ...]) -> None:
        module.words = words  # type: ignore[attr-defined]
        module.action(context)

    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_verb", module)
    monkeypatch.setitem(cli_main.VERBS, "fake", ("fake_verb:command", "Does nothing."))
    for variable in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(variable, raising=False)
    return module


def raising(error: BaseException) -> object:
    def action(context: click.Context) -> None:
        raise error

    return action


def test_help_lists_every_verb_and_is_quick() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = dsft("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    for name, (_, help_line) in cli_main.VERBS.items():
        assert f"  {name} " in done.stdout
        assert help_line in done.stdout
    assert min(seconds) < 0.3


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom dsft.cli.main import run\nrun(['--help'])\n"
        f"print('HEAVY', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("verb_name", list(cli_main.VERBS))
def test_the_help_of_every_verb_imports_no_torch(verb_name: str) -> None:
    code = (
        f"import sys\nfrom dsft.cli.main import run\nassert run([{verb_name!r}, '--help']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("spelling", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"]])
def test_a_local_rank_before_the_verb_reaches_it(verb: types.ModuleType, spelling: list[str]) -> None:
    seen = []
    verb.action = lambda context: seen.append(context.obj["local_rank"])  # type: ignore[attr-defined]
    assert cli_main.run([*spelling, "fake", "a", "b"]) == 0
    assert seen == [3]
    assert verb.words == ("a", "b")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("the key x"), 2, "the key x"),
        (SaveError("no space"), 74, "no space"),
        (StoppedEarly("requeue me"), 75, "requeue me"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_messages_with_their_exit_code(
    verb: types.ModuleType, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    verb.action = raising(error)  # type: ignore[attr-defined]
    assert cli_main.run(["fake"]) == code
    captured = capsys.readouterr()
    assert captured.err.strip() == text
    assert captured.out == ""


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_a_rank_other_than_0_says_who_it_is(
    verb: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    verb.action = raising(ConfigError("wrong"))  # type: ignore[attr-defined]
    monkeypatch.setenv(variable, "3")
    cli_main.run(["fake"])
    assert capsys.readouterr().err.strip() == f"[{os.uname().nodename}, rank 3] wrong"
    monkeypatch.setenv(variable, "0")
    cli_main.run(["fake"])
    assert capsys.readouterr().err.strip() == "wrong"


def test_unexpected_errors_keep_their_traceback(verb: types.ModuleType) -> None:
    verb.action = raising(RuntimeError("a bug"))  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="a bug"):
        cli_main.run(["fake"])


def test_usage_errors_exit_2() -> None:
    done = dsft("trian")
    assert done.returncode == 2
    assert "trian" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_one_paragraph_without_traceback(tmp_path: Path) -> None:
    done = dsft("config", "check", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "there is no file" in done.stderr

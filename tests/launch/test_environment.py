"""The variables that come to other hosts: which, through which file, and past which shell."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from dsft.errors import LaunchError
from dsft.launch.environment import (
    SECRETS_VARIABLE,
    adopt_secrets,
    environment_files,
    read_environment_file,
    travelling,
    write_environment,
)

ODD = ["plain", "two words", "it's", '"quoted"', "$HOME and `date` and \\", "a%hb 100%", "", "a;b|c>d", "ünï"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A=1\n\nB=2\n", "line 2: this line is blank"),
        ("A\n", "line 1: this line has no '=' ('A')"),
        ("# A=1\n", "line 1: this line is a comment"),
        ("export A=1\n", "sets 'export A', which is no name of a variable"),
        ('A="x y"\n', "quotation marks around the value of A"),
    ],
)
def test_lines_on_which_deepspeed_would_fail_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text(text)
    with pytest.raises(LaunchError, match=re.escape(said)):
        read_environment_file(path)


def test_what_travels_and_what_does_not(tmp_path: Path) -> None:
    home, working = tmp_path / "home", tmp_path / "work"
    for folder, text in ((home, "NCCL_DEBUG=INFO\nA=home\n"), (working, "A=work\nB=c=d\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    environ = {
        "HF_HOME": "/hf",
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "4",
        "NCCL_DEBUG": "WARN",
    }
    values = travelling(environ, environment_files(environ, working, home))
    assert values == {"HF_HOME": "/hf", "OMP_NUM_THREADS": "4", "NCCL_DEBUG": "INFO", "A": "work", "B": "c=d"}
    assert environment_files({"DS_ENV_FILE": str(working / ".deepspeed_env")}, working, home) == [
        working / ".deepspeed_env"
    ]


@pytest.mark.parametrize("value", ODD)
def test_a_value_comes_out_of_deepspeeds_file_and_the_other_hosts_shell_as_it_went_in(
    tmp_path: Path, value: str
) -> None:
    """Through DeepSpeed's own reader of the file, and a shell; what pdsh does (%% becomes %) is done by hand here."""
    path = write_environment(tmp_path, {"WANDB_NOTES": value})
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for line in path.read_text().splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    script = "; ".join(f"export {name}={text}" for name, text in runner.exports.items()).replace("%%", "%")
    said = subprocess.run(
        ["bash", "-c", f'{script}; printf %s "$WANDB_NOTES"'], capture_output=True, text=True, check=True
    )
    assert said.stdout == value


def test_secrets_come_to_the_ranks_past_every_command_line(tmp_path: Path) -> None:
    path = write_environment(tmp_path, {"HF_TOKEN": "hidden=1", "WANDB_API_KEY": "key", "HF_HOME": "/hf"})
    assert "hidden" not in path.read_text()
    values = read_environment_file(path)
    assert stat.S_IMODE(Path(values[SECRETS_VARIABLE]).stat().st_mode) == 0o600
    environ = {SECRETS_VARIABLE: values[SECRETS_VARIABLE], "WANDB_API_KEY": "own"}
    adopt_secrets(environ)
    assert (environ["HF_TOKEN"], environ["WANDB_API_KEY"]) == ("hidden=1", "own")
    write_environment(tmp_path, {"HF_HOME": "/hf"})
    assert not (tmp_path / "secrets.env").exists()
    with pytest.raises(LaunchError, match="must be on a file system that all hosts see"):
        adopt_secrets(environ)

"""The variables that must come to the ranks of other hosts, which ``deepspeed`` leaves behind.

Over pdsh it passes on PYTHON*, UCX*, MV2*, MLFLOW* and the lines of ``.deepspeed_env``, nothing else, and prints them
with the whole command. So a start writes a file of its own with those lines and the variables of ``TRAVELLING``; tokens
and keys go in a file that only the user can read and no command line shows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from dsft.errors import LaunchError
from dsft.fsio import save_error, write_bytes

TRAVELLING = (
    *(
        "DSFT_",
        "HF_",
        "TRANSFORMERS_",
        "TOKENIZERS_",
        "WANDB_",
        "OMP_",
        "MKL_",
        "KMP_",
        "NCCL_",
        "GLOO_",
        "TORCH_",
        "DS_",
    ),
    *("PYTORCH_", "XDG_CACHE_HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
"""Prefixes of the variables that the ranks on other hosts get as whoever starts the run has them."""
FILE_VARIABLE = "DS_ENV_FILE"
"""Where deepspeed looks for another name of ``.deepspeed_env``; an absolute path is one file."""
SECRETS_VARIABLE = "DSFT_SECRETS_FILE"
_SECRET = re.compile(r"TOKEN$|_TOKEN_|KEY$|SECRET|PASSWORD|CREDENTIAL")
_NAME = re.compile(r"[A-Za-z_]\w*")
_AS_IT_IS = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
"""Values around which deepspeed writes no quotation marks."""


def environment_files(environ: Mapping[str, str], working: Path, home: Path) -> list[Path]:
    """The files that deepspeed would read, in its order."""
    name = environ.get(FILE_VARIABLE, ".deepspeed_env")
    return [path for path in dict.fromkeys((home / name, working / name)) if path.is_file()]


def read_environment_file(path: Path) -> dict[str, str]:
    """The variables of a ``.deepspeed_env``.

    Raises:
        LaunchError: a line on which deepspeed would fail, or which its shell would take for something else.
    """
    values = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, equals, value = line.partition("=")
        trouble = None
        if not line.strip():
            trouble = "is blank, and deepspeed ends with a traceback there. Remove the line"
        elif line.lstrip().startswith("#"):
            trouble = "is a comment, which would hide the rest of the command from the shell. Remove the line"
        elif not equals:
            trouble = f"has no '=' ({line.strip()!r}), and deepspeed ends with a traceback there. Write NAME=value"
        elif not _NAME.fullmatch(name.strip()):
            trouble = f"sets {name.strip()!r}, which is no name of a variable. Write NAME=value, without 'export'"
        elif value.strip()[:1] in ("'", '"'):
            trouble = f"has quotation marks around the value of {name.strip()}; deepspeed adds its own. Remove them"
        if trouble is not None:
            raise LaunchError(f"{path}, line {number}: this line {trouble}.")
        values[name.strip()] = value.strip()
    return values


def travelling(environ: Mapping[str, str], files: Sequence[Path]) -> dict[str, str]:
    """What must come to the other hosts: this process's variables, and over them the lines of the files."""
    values = {name: value for name, value in environ.items() if name.startswith(TRAVELLING)}
    for path in files:
        values |= read_environment_file(path)
    for name in (FILE_VARIABLE, SECRETS_VARIABLE):
        values.pop(name, None)
    for name, value in values.items():
        if "\n" in value:
            raise LaunchError(f"the variable {name} has more than one line and cannot come to other hosts. Unset it.")
    return values


def write_environment(folder: Path, values: Mapping[str, str]) -> Path:
    """Write the file for deepspeed, and beside it the one with the secrets, into the shared run folder.

    Raises:
        SaveError: the folder cannot be written.
    """
    secret = {name: value for name, value in values.items() if _SECRET.search(name)}
    plain = {name: value for name, value in values.items() if name not in secret}
    secrets_path = folder / "secrets.env"
    secrets_path.unlink(missing_ok=True)
    if secret:
        plain[SECRETS_VARIABLE] = str(secrets_path.absolute())
        try:
            descriptor = os.open(secrets_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.writelines(f"{name}={value}\n" for name, value in secret.items())
        except OSError as error:
            raise save_error(secrets_path, error) from error
    path = folder.absolute() / "deepspeed.env"
    write_bytes(path, "".join(f"{name}={_for_deepspeed(value)}\n" for name, value in sorted(plain.items())).encode())
    return path


def remove_secrets(folder: Path) -> None:
    """The run is over; nobody reads them any more."""
    (folder / "secrets.env").unlink(missing_ok=True)


def adopt_secrets(environ: MutableMapping[str, str]) -> None:
    """On a rank: take the variables that were too secret for a command line. A rank that has them keeps its own.

    Raises:
        LaunchError: the file that should hold them cannot be read.
    """
    path = environ.get(SECRETS_VARIABLE)
    if path is None:
        return
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LaunchError(
            f"cannot read {path}, in which dsft launch keeps tokens for the ranks ({error.strerror}). The run folder "
            "must be on a file system that all hosts see; if it is, start the run again."
        ) from error
    for line in lines:
        name, _, value = line.partition("=")
        environ.setdefault(name, value)


def _for_deepspeed(value: str) -> str:
    """A value as it must stand in the file, so that the other host's shell gets it back.

    deepspeed puts quotation marks around unusual values but escapes nothing in them, and pdsh replaces %h and friends.
    """
    value = value.replace("%", "%%")
    if _AS_IT_IS.fullmatch(value):
        return value
    return re.sub(r'(["$`\\])', r"\\\1", value)

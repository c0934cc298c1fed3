from __future__ import annotations

from pathlib import Path

import pytest

from dsft.config.hostfile import Host, parse_hostfile
from dsft.errors import ConfigError

HOSTFILES = sorted((Path(__file__).resolve().parents[2] / "hostfiles").glob("*.txt"))


@pytest.mark.parametrize("file", HOSTFILES, ids=lambda file: file.stem)
def test_the_examples_read_as_deepspeed_reads_them(file: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert [(host.name, host.slots) for host in parse_hostfile(file)] == list(fetch_hostfile(str(file)).items())


def test_comments_blank_lines_and_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# a comment\n\nnode-b   slots=4  # trailing\r\nnode-a slots=8\n")
    assert parse_hostfile(path) == (Host("node-b", 4), Host("node-a", 8))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a slots=2\n\na slots=3\n", ["line 3", "a is listed twice", "line 1"]),
        ("a slots=2\nb\n", ["line 2", "expected 'hostname slots=N', found 'b'"]),
        ("a slots=two\n", ["line 1", "expected 'hostname slots=N'"]),
        ("a slots = 2\n", ["line 1", "expected 'hostname slots=N'"]),
        ("a slots=0\n", ["line 1", "slots=0"]),
        ("# nothing\n\n", ["names no host"]),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(path)
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the hostfile"):
        parse_hostfile(tmp_path / "none")

"""A run whose token stores were copied to an object store, on machines without the raw data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft.cli.main import run as run_cli
from dsft.constants import EXIT_OK, EXIT_USAGE
from dsft.train.verify_run import verify_run
from tests.support.object_store import s3_server
from tests.support.tiny_run import records, write_tiny_run

PLACE = "data.store_dir=s3://corpus/store"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose prepared stores are in S3, and whose raw data and local stores are gone."""
    import botocore.session

    folder = tmp_path_factory.mktemp("run")
    file = write_tiny_run(folder)
    local = folder / "prepared"
    assert run_cli(["prepare", str(file), "--set", f"data.store_dir={local}"]) == EXIT_OK
    with s3_server(folder / "server.log") as environment:
        client = botocore.session.get_session().create_client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
        client.create_bucket(Bucket="corpus")
        for path in sorted(local.rglob("*")):
            if path.is_file():
                key = f"store/{path.relative_to(local)}"
                client.put_object(Bucket="corpus", Key=key, Body=path.read_bytes())
        for raw in folder.glob("*.jsonl"):
            raw.unlink()
        local.rename(folder / "moved")
        yield file


def stats(capsys: pytest.CaptureFixture[str], file: Path, *overrides: str) -> Any:
    arguments = [argument for override in overrides for argument in ("--set", override)]
    assert run_cli(["data", "stats", str(file), "--json", *arguments]) == EXIT_OK
    return json.loads(capsys.readouterr().out)


def test_a_store_at_a_url_is_opened_as_it_is(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (held_out, topics) = sorted(stats(capsys, run_file, PLACE)["sources"], key=lambda row: row["name"])
    assert (held_out["name"], topics["name"]) == ("held_out", "topics")
    assert topics["documents"] == 50
    cached = list((run_file.parent / "runs" / "store-cache" / "files").iterdir())
    assert cached, "read through the cache beside the run's folder"


def test_nothing_is_prepared_at_a_url(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["prepare", str(run_file), "--set", PLACE]) == EXIT_USAGE
    assert "token stores are read from there, not prepared" in capsys.readouterr().err


def test_a_store_of_another_configuration_is_not_taken(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", PLACE, "--set", "data.sources.0.text_field=body"]
    assert run_cli(["data", "stats", str(run_file), *arguments]) == EXIT_USAGE
    message = " ".join(capsys.readouterr().err.split())
    assert "manifest.json cannot be read: there is no such file" in message
    assert "the name that `dsft prepare` gives it under this configuration" in message


@pytest.mark.launch
def test_it_is_trained_from_there_and_verified_from_there(run_file: Path, tmp_path: Path) -> None:
    settings = [PLACE, f"run.dir={tmp_path / 'run'}", "train.steps=3", "data.cache_bytes=4000"]
    command = [sys.executable, "-m", "dsft", "train", str(run_file)]
    command += [argument for setting in settings for argument in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ.copy(), check=False)
    assert done.returncode == EXIT_OK, done.stderr
    assert [record["step"] for record in records(tmp_path / "run", "step")] == [1, 2, 3]
    report = verify_run(tmp_path / "run", lambda step, last: None)
    assert report.is_proved, report.problems
    assert report.steps == 3

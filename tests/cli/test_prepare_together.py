"""``dsft prepare`` by one process, under mpirun, and by the tasks of a job array in turn: the same bytes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from dsft.cli.main import run
from dsft.corpus.claims import claimed
from tests.support.launch import need
from tests.support.ranks import REPOSITORY
from tests.support.slurm import PROGRAMS, slurm_cluster
from tests.support.tokenizers import tiny_tokenizer_folder

NAMES = sorted(topics)[:20]
YAML = """\
run: {{name: t, dir: {folder}/run}}
model: {{config: {{model_type: llama}}, tokenizer: {folder}/tokenizer}}
data: {{pack_tokens: 512, store_dir: {store}, sources: [{{name: docs, path: "{folder}/raw"}}]}}
train: {{tokens: 100K, global_batch_packs: 4, lr: 1e-3}}
evaluate: {{sets: [{{name: held, path: {folder}/raw, max_documents: 5}}]}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    tiny_tokenizer_folder(folder)
    (folder / "raw").mkdir()
    for number in range(5):
        lines = [json.dumps({"text": topics[name]}) + "\n" for name in NAMES[number::5]]
        (folder / "raw" / f"{number}.jsonl").write_text("".join(lines))
    assert run(["prepare", str(write_yaml(folder, "one"))]) == 0
    return folder


def write_yaml(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(YAML.format(folder=folder, store=folder / name))
    return path


def stored(folder: Path, name: str) -> dict[str, bytes]:
    files = {str(path.relative_to(folder / name)): path for path in (folder / name).rglob("*") if path.is_file()}
    return {key: path.read_bytes() for key, path in files.items()}


def test_an_array_whose_tasks_come_one_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_yaml(folder, "array")
    for name, value in {"MIN": "0", "MAX": "2", "COUNT": "3", "STEP": "1"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    said = []
    (name,) = (docs.name for docs in (folder / "one").glob("docs-*"))
    (folder / "array" / name).mkdir(parents=True)
    for task in (2, 0, 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        with claimed(folder / "array" / name, 3 if task == 2 else 99, is_alone=False):  # another task is at shard 3
            assert run(["prepare", str(path), "--array"]) == 0
        said.append(capsys.readouterr().out)
    assert "this task's share is prepared" in said[0]
    assert "docs: 20 documents" not in said[0]
    assert "docs: 20 documents" in said[1]
    assert stored(folder, "array") == stored(folder, "one")


def test_workers_and_ranks_are_two_ways(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert run(["prepare", str(write_yaml(folder, "both")), "--workers", "2"]) == 2
    assert "--workers" in capsys.readouterr().err


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_under_mpirun(folder: Path) -> None:
    if shutil.which("mpirun") is None and "CI" not in os.environ:
        pytest.skip("no mpirun here")
    path = write_yaml(folder, "mpi")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, "-m", "dsft", "prepare"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("docs: 20 documents") == 1
    assert stored(folder, "mpi") == stored(folder, "one")


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_job_array_of_a_slurm_cluster(folder: Path) -> None:
    need(*PROGRAMS)
    path, log = write_yaml(folder, "slurm"), folder / "array-%a.log"
    task = shlex.join([sys.executable, "-m", "dsft", "prepare", str(path), "--array"])
    with slurm_cluster() as environ:
        done = subprocess.run(
            ["sbatch", "--array=0-2", "--wait", f"--output={log}", "--wrap", task],
            env={**os.environ, **environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    said = [one.read_text() for one in sorted(folder.glob("array-*.log"))]
    assert (done.returncode, len(said)) == (0, 3), (done.stderr, said)
    assert any("docs: 20 documents" in one for one in said), said
    assert stored(folder, "slurm") == stored(folder, "one")

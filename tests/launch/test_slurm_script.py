"""`dsft slurm`: what the script asks for and starts, the moment of its signal, and what cannot be meant."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dsft.cli.main import run
from dsft.errors import ConfigError
from dsft.launch.slurm import (
    DEFAULT_SIGNAL_SECONDS,
    LEAST_SIGNAL_SECONDS,
    Job,
    measured_signal_seconds,
    time_limit_seconds,
    write_script,
)
from tests.conftest import REPOSITORY

JOB = Job(
    name="medical",
    config="my runs/run.yaml",
    run_dir="runs/the run",
    nodes=4,
    tasks_per_node=8,
    gpus_per_node=8,
    time_limit="24:00:00",
    signal_seconds=300,
    max_requeues=50,
    python="python",
    overrides=("train.lr=1e-5", "run.name=it's"),
    options=("--partition=gpu",),
    setup=("module load cuda",),
)
STAND_INS = """
srun() { printf '%s\\n' "$@" > srun.txt; mkdir -p "$checkpoints/$MAKES"; return $CODE; }
scontrol() { echo "$@" > requeued.txt; }
"""


def execute(folder: Path, code: int, makes: str, restarts: int = 0) -> tuple[int, list[str], bool]:
    """Run the script with functions in place of srun and scontrol; its exit code, srun's words, whether requeued."""
    text = write_script(JOB).replace("trap :", f"{STAND_INS}\ntrap :").replace("module load cuda", "")
    (folder / "requeued.txt").unlink(missing_ok=True)
    environ = {"PATH": "/usr/bin:/bin", "CODE": str(code), "MAKES": makes, "SLURM_JOB_ID": "7"}
    environ["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environ, timeout=30, check=False)
    words = (folder / "srun.txt").read_text().splitlines()
    return done.returncode, words, (folder / "requeued.txt").exists()


def test_the_options_of_the_script() -> None:
    asked = [line.removeprefix("#SBATCH ") for line in write_script(JOB).splitlines() if line.startswith("#SBATCH")]
    assert asked == [
        *("--job-name=medical", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=24:00:00"),
        *("--signal=USR1@300", "--requeue", "--open-mode=append", '--output="runs/the run-slurm-%j.log"'),
        "--partition=gpu",
    ]
    cpu = write_script(replace(JOB, gpus_per_node=0, cpus_per_task=12))
    assert "--gpus" not in cpu
    assert "#SBATCH --cpus-per-task=12\n" in cpu


def test_it_starts_one_run_of_the_asked_size_and_resumes_where_a_checkpoint_is(tmp_path: Path) -> None:
    code, words, requeued = execute(tmp_path, 0, "step-00000010")
    assert (code, requeued) == (0, False)
    train = ["python", "-m", "dsft", "train", "my runs/run.yaml", "--set", "run.world_size=32"]
    train += ["--set", "train.lr=1e-5", "--set", "run.name=it's"]
    assert words == ["--kill-on-bad-exit=0", "--wait=60", *train]
    _, words, _ = execute(tmp_path, 0, "step-00000010")
    assert words[2:] == [*train, "--resume", "auto"]


def test_it_requeues_a_stopped_run_that_came_forward_and_no_other(tmp_path: Path) -> None:
    assert execute(tmp_path, 75, "step-00000010")[::2] == (75, True)
    assert execute(tmp_path, 75, "step-00000010")[::2] == (75, False), "no new checkpoint: it would run for ever"
    assert execute(tmp_path, 75, "step-00000010.staging-1")[::2] == (75, False), "not committed"
    assert execute(tmp_path, 1, "step-00000020")[::2] == (1, False)
    assert execute(tmp_path, 75, "step-00000030", restarts=50)[::2] == (75, False)
    assert execute(tmp_path, 75, "step-00000040", restarts=49)[::2] == (75, True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-00:00:01", 86401),
        ("0", None),
        ("unlimited", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert time_limit_seconds(text) == seconds


def test_a_time_limit_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="not a time limit"):
        write_script(replace(JOB, time_limit="a day"))
    with pytest.raises(ConfigError, match="nothing would be trained"):
        write_script(replace(JOB, time_limit="5:00"))


def test_the_signal_comes_early_enough_for_the_saves_of_this_run(tmp_path: Path) -> None:
    assert measured_signal_seconds(tmp_path) == DEFAULT_SIGNAL_SECONDS
    records = [{"kind": "step", "step": 10, "seconds": 200.0}]
    records += [
        {"kind": "checkpoint", "step": 10, "write_seconds": 100.0},
        {"kind": "step", "step": 20, "seconds": 150.0},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "checkpoint", "sec')
    assert measured_signal_seconds(tmp_path) == 3 * (100 + 2 * 20) + 60
    (tmp_path / "metrics.jsonl").write_text(text.replace("100.0", "1.0").replace("200.0", "2.0"))
    assert measured_signal_seconds(tmp_path) == max(LEAST_SIGNAL_SECONDS, 3 * (1 + 2 * 15) + 60)


def test_the_example_is_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "ds_configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "stages.sbatch"
    words = "slurm examples/stages.yaml --nodes 4 --gpus-per-node 8 --cpus-per-task 12 --time 24:00:00 --python python"
    assert run([*words.split(), "--option=--partition=gpu", "--out", str(script)]) == 0
    assert script.read_text() == (REPOSITORY / "examples/slurm/stages.sbatch").read_text()


def test_without_sbatch_the_script_is_kept_and_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = str(REPOSITORY / "examples/sft.yaml")
    assert run(["slurm", config, "--nodes", "1", "--time", "1:00:00", "--out", "job.sbatch", "--submit"]) == 2
    assert "job.sbatch was written but not submitted" in capsys.readouterr().err
    assert (tmp_path / "job.sbatch").exists()


def test_a_job_that_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages as jobs: a job array that prepares the data, then a run, then one that goes on from it."""
    monkeypatch.chdir(tmp_path)
    config = str(REPOSITORY / "examples/sft.yaml")
    words = ["slurm", config, "--nodes", "1", "--time", "1:00:00", "--out", "job.sbatch"]
    assert run([*words, "--after", "4711"]) == 0
    assert "#SBATCH --dependency=afterok:4711\n" in Path("job.sbatch").read_text()
    assert run(words) == 0
    assert "--dependency" not in Path("job.sbatch").read_text()

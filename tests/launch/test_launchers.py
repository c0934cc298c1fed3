"""One run through every launcher: the same losses as alone; what a launcher gets wrong is said, not trained."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.launch import exit_code, launched, need
from tests.support.ranks import free_port
from tests.support.slurm import PROGRAMS, slurm_cluster
from tests.support.tiny_run import NUM_STEPS, losses, records, write_tiny_run

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

LIMIT_SECONDS = 300.0
BIN = Path(sys.executable).parent
DSFT = ["-m", "dsft", "train", "run.yaml"]
PORT = "<a free port>"
MULTI = [
    *(str(BIN / "deepspeed"), "--hostfile", "hosts.txt", "--no_ssh_check", "--force_multi"),
    *("--master_addr", "127.0.0.1", "--master_port", PORT),
]
LAUNCHERS = {
    "alone": [sys.executable, *DSFT],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", PORT, "--module", *DSFT[1:]],
    "hostfile": [
        *(str(BIN / "deepspeed"), "--hostfile", "hosts.txt", "--no_ssh_check", "--master_addr", "127.0.0.1"),
        *("--master_port", PORT, "--module", *DSFT[1:]),
    ],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", PORT, *DSFT],
    "openmpi": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, *DSFT],
    "mpich": ["mpirun.mpich", "-np", "2", sys.executable, *DSFT],
    "slurm": ["srun", "--nodes", "2", "--ntasks", "2", sys.executable, *DSFT],
    # These two leave --module out or break on it (DeepSpeed 0.19.8), so they get the dsft program itself.
    "deepspeed --launcher mpich": [*MULTI, "--launcher", "mpich", str(BIN / "dsft"), *DSFT[2:]],
    "deepspeed --launcher slurm": [
        *(*MULTI, "--launcher", "slurm", "--launcher_args", "--nodes 2", str(BIN / "dsft"), *DSFT[2:]),
    ],
    "deepspeed --launcher openmpi": [
        *(*MULTI, "--launcher", "openmpi", "--launcher_args", "--allow-run-as-root --oversubscribe"),
        *("--module", *DSFT[1:]),
    ],
}


def command(launcher: str, run_dir: Path, *options: str) -> list[str]:
    words = [str(free_port()) if word is PORT else word for word in LAUNCHERS[launcher]]
    return [*words, "--set", f"run.dir={run_dir}", *options]


@dataclass
class Runs:
    """The tiny run, and the losses of every launcher that ran it."""

    folder: Path
    losses: dict[str, list[float]] = field(default_factory=dict)

    def environ(self) -> dict[str, str]:
        """With locks planted where DeepSpeed's ops are loaded, as processes leave them that were killed meanwhile."""
        extensions = self.folder / "extensions"
        for op in ("deepspeed_shm_comm", "cpu_adam"):
            (extensions / op).mkdir(parents=True, exist_ok=True)
            (extensions / op / "lock").touch()
        return {"TORCH_EXTENSIONS_DIR": str(extensions), "LD_LIBRARY_PATH": str(self.libraries())}

    def libraries(self) -> Path:
        """A folder with Debian's MPICH under the name that MPICH itself gives its library, and that mpi4py loads."""
        folder = self.folder / "lib"
        folder.mkdir(exist_ok=True)
        for library in Path("/usr/lib").glob("*/libmpich.so.12"):
            if not (folder / "libmpi.so.12").exists():
                (folder / "libmpi.so.12").symlink_to(library)
        return folder

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def finish(self, launcher: str, environ: Mapping[str, str] | None = None) -> list[float]:
        """Run to the end under ``launcher``, once for all tests; its losses."""
        if launcher not in self.losses:
            log = self.folder / f"{launcher}.log"
            environ = {**self.environ(), **(environ or {})}
            run_dir = self.run_dir(launcher)
            assert exit_code(command(launcher, run_dir), log, environ, LIMIT_SECONDS) == 0, log.read_text()
            assert not list((self.folder / "extensions").glob("*/lock"))
            assert world_size(run_dir) == (1 if launcher == "alone" else 2)
            self.losses[launcher] = losses(run_dir)
        return self.losses[launcher]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("launchers")
    write_tiny_run(folder)
    (folder / "hosts.txt").write_text("# this machine\n\nlocalhost slots=2\n")
    return Runs(folder)


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    need(*PROGRAMS)
    with slurm_cluster() as environ:
        yield environ


def world_size(run_dir: Path) -> int:
    """Number of ranks that saved the last checkpoint."""
    checkpoint = max((run_dir / "checkpoints").glob("step-*"))
    size = json.loads((checkpoint / "state.json").read_text())["world_size"]
    assert len(list(checkpoint.glob("shards/*.safetensors"))) == size
    return int(size)


@pytest.mark.parametrize(
    "launcher",
    [
        *("deepspeed", "hostfile", "torchrun"),
        *(
            pytest.param(name, marks=pytest.mark.cluster)
            for name in ("openmpi", "mpich", "deepspeed --launcher openmpi")
        ),
    ],
)
def test_the_losses_are_those_of_one_rank_alone(runs: Runs, launcher: str) -> None:
    need(LAUNCHERS[launcher][0])
    assert len(runs.finish("alone")) == NUM_STEPS + 1
    assert runs.finish(launcher) == pytest.approx(runs.finish("alone"), rel=1e-5)


@pytest.mark.cluster
def test_the_losses_under_srun_on_two_nodes(runs: Runs, slurm: dict[str, str]) -> None:
    assert runs.finish("slurm", slurm) == pytest.approx(runs.finish("alone"), rel=1e-5)


@pytest.mark.cluster
def test_the_losses_under_deepspeed_with_the_launcher_slurm(runs: Runs, slurm: dict[str, str]) -> None:
    assert runs.finish("deepspeed --launcher slurm", slurm) == pytest.approx(runs.finish("alone"), rel=1e-5)


@pytest.mark.cluster
def test_the_losses_under_deepspeed_with_the_launcher_mpich(runs: Runs) -> None:
    """It calls ``mpirun``, which is Open MPI's where both are installed."""
    need("mpirun.mpich")
    program = runs.folder / "bin" / "mpirun"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nexec mpirun.mpich "$@"\n')
    program.chmod(0o755)
    environ = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    assert runs.finish("deepspeed --launcher mpich", environ) == pytest.approx(runs.finish("alone"), rel=1e-5)


@pytest.mark.cluster
@pytest.mark.parametrize(("launcher", "library"), [("openmpi", "libmpi.so.12"), ("mpich", "libmpi.so.40")])
def test_mpi4py_with_the_other_mpi_is_refused(runs: Runs, launcher: str, library: str) -> None:
    """Every rank would find a world of its own, of one rank, and train alone."""
    need(LAUNCHERS[launcher][0])
    log, run_dir = runs.folder / f"other-{launcher}.log", runs.run_dir(f"other-{launcher}")
    environ = {**runs.environ(), "MPI4PY_LIBMPI": library}
    assert exit_code(command(launcher, run_dir), log, environ, LIMIT_SECONDS) == 2
    assert re.search(r"mpirun's variables say rank \d of 2, but mpi4py says rank 0 of 1", log.read_text())
    assert "Set MPI4PY_LIBMPI to the libmpi of this mpirun" in log.read_text()
    assert not run_dir.exists()


@pytest.mark.cluster
def test_the_doctor_asks_every_node_of_a_slurm_job_and_measures_their_network(
    runs: Runs, slurm: dict[str, str]
) -> None:
    log = runs.folder / "doctor.log"
    words = ["salloc", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "dsft", "doctor", "--slurm"]
    assert exit_code([*words, "--folder", str(runs.folder)], log, slurm, LIMIT_SECONDS) == 0, log.read_text()
    said = log.read_text()
    assert re.search(r"ok +reachable +2 hosts answered", said)
    assert re.search(r"ok +folder \S+ +shared and written by every host", said)
    assert re.search(r"ok +bandwidth +all-reduce [\d,]+ MB/s", said)


def test_a_hostfile_that_is_not_there_is_caught_by_the_world_size(runs: Runs) -> None:
    log, run_dir = runs.folder / "missing.log", runs.run_dir("missing")
    words = command("hostfile", run_dir, "--set", "run.world_size=16")
    words[words.index("hosts.txt")] = "no-such-file.txt"
    assert exit_code(words, log, runs.environ(), LIMIT_SECONDS) == 2  # the launcher passes the ranks' exit code on
    assert "run.world_size asks for 16 ranks but deepspeed started" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not run_dir.exists()


def test_one_signalled_rank_stops_all_before_the_same_step_and_a_resume_goes_on(runs: Runs) -> None:
    """A launcher signals its ranks up to 30 s apart, so one that knows of the signal must be enough."""
    run_dir = runs.run_dir("stopped")
    place = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        ranks = []
        for rank in "01":
            environ = {**runs.environ(), **place, "RANK": rank, "LOCAL_RANK": rank}
            log = runs.folder / f"stopped-{rank}.log"
            ranks.append(stack.enter_context(launched(command("alone", run_dir), log, environ)))
        wait_until_it_trains(run_dir, ranks)
        psutil.Process(ranks[1].pid).suspend()  # so that the run stands still while the others look at it
        ranks[1].send_signal(signal.SIGTERM)
        a_second_run_is_refused(runs, run_dir, owner=ranks[0].pid)
        psutil.Process(ranks[1].pid).resume()
        codes = [rank.wait(LIMIT_SECONDS) for rank in ranks]
    assert codes == [75, 75], [log.read_text() for log in sorted(runs.folder.glob("stopped-*.log"))]
    state = json.loads((run_dir / "run_state.json").read_text())
    steps = [record["step"] for record in records(run_dir, "step")]
    assert (state["status"], state["step"]) == ("stopped", steps[-1])
    assert steps[-1] < NUM_STEPS
    assert world_size(run_dir) == 2
    assert max((run_dir / "checkpoints").glob("step-*")).name == f"step-{steps[-1]:08d}"

    log = runs.folder / "resumed.log"
    words = command("torchrun", run_dir, "--resume", "auto")
    assert exit_code(words, log, runs.environ(), LIMIT_SECONDS) == 0, log.read_text()
    assert losses(run_dir) == runs.finish("torchrun")  # to the bit


def wait_until_it_trains(run_dir: Path, ranks: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not records(run_dir, "step"):
        assert all(rank.poll() is None for rank in ranks), "a rank ended before its first step"
        assert time.monotonic() < deadline, "no step was trained"
        time.sleep(0.005)


def a_second_run_is_refused(runs: Runs, run_dir: Path, owner: int) -> None:
    log = runs.folder / "second.log"
    assert exit_code(command("alone", run_dir), log, runs.environ(), LIMIT_SECONDS) == 2
    assert f"is owned by another live run: process {owner} on " in log.read_text()
    assert "Traceback" not in log.read_text()
    assert json.loads((run_dir / "owner.lock").read_text())["pid"] == owner  # still

"""A storm of kills over real runs: after each one the run goes on by itself, and in the end nothing shows.

    python -m tests.faults.storm --faults 200 --state storm.json

Runs of a tiny model are killed again and again (a rank, all ranks, the launcher; at random times and at every point of
a save at which it touches a file) and resumed with ``--resume if-any``. When a run has come to its end, its weights
must be those of a run that nobody disturbed, and ``data verify-run`` must prove that no document was lost or repeated.
The state file lets a storm that was itself interrupted go on; its folder holds the runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dsft.fsio import write_json
from dsft.launch.heartbeat import read_beats
from dsft.launch.owner import read_run_state
from tests.faults.crash_points import CRASH_AT, RECORD_TO
from tests.faults.ranks import PRELOAD, Ranks, launched_ranks, quick_ranks
from tests.support.tiny_run import NUM_STEPS, records, write_tiny_run

TRAIN_TOKENS, EVERY_STEPS, FAULTS_PER_RUN = 15_000, 3, 12
"""About 60 steps, and one and a half times the data."""
LEFT_SECONDS = 180.0
"""After a fault, until no rank may be left. Ranks end within 30 s of their launcher, once they have started."""
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
LIMIT_SECONDS = 300.0
MAX_DIFFERENCE = 1e-5
"""Of any weight, where the number of ranks changed on the way."""


@dataclass
class Fault:
    """What is done to one start of a run.

    Attributes:
        kind: ``rank``, ``all``, ``runner``, ``node_launcher`` or ``point``.
        launcher: under ``deepspeed``, not as quick ranks.
        num_ranks: of this start.
        after_steps: that the start may take before it happens; None: at a random time of its set-up.
        delay_seconds: then so much later.
        point: for ``point``: rank|occurrence|name.
        hit: it happened; the run may have ended before.
        seconds: from the fault until no rank was left.
    """

    kind: str
    launcher: bool
    num_ranks: int
    after_steps: int | None
    delay_seconds: float
    point: str | None = None
    hit: bool = False
    seconds: float = 0.0


@dataclass
class State:
    """What a storm knows of itself; written after each fault."""

    seed: int
    sizes: list[int]
    launcher_share: float
    points: list[str] = field(default_factory=list)
    points_left: list[str] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    faults_in_run: int = 0
    sizes_of_run: list[int] = field(default_factory=list)


class Storm:
    """Faults, one after the other, over runs in ``folder``.

    Args:
        path: the state file; runs lie beside it, in a folder of its name.
        state: to begin or go on with.
    """

    def __init__(self, path: Path, state: State) -> None:
        self.path, self.state = path, state
        self.folder = path.with_suffix("").absolute()
        self.random = random.Random(f"{state.seed}/{len(state.faults)}")

    def prepare(self) -> None:
        """The data, the undisturbed run, and the points at which a save can be cut."""
        if self.state.points:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        path = write_tiny_run(self.folder)
        path.write_text(path.read_text().replace(f"steps: {NUM_STEPS}", f"tokens: {TRAIN_TOKENS}"))
        points = self.folder / "points"
        points.mkdir()
        self._start("undisturbed", self.state.sizes[0], None, {RECORD_TO: str(points)})
        assert self._status("undisturbed") == "finished", (self.folder / "undisturbed.log").read_text()[-3000:]
        names = {f"{path.name[5:]}|{name}" for path in points.iterdir() for name in path.read_text().splitlines()}
        self.state.points = sorted(names)
        self._export("undisturbed")
        self._write()

    def go_on(self, num_faults: int, deadline: float) -> None:
        """Until so many faults have hit and the run they hit has ended, or it is ``deadline``."""
        while self._num_hits() < num_faults or self.state.faults_in_run:
            if time.monotonic() > deadline:
                return
            name = f"run-{len(self.state.runs):03d}"
            calm = self.state.faults_in_run >= FAULTS_PER_RUN or self._num_hits() >= num_faults
            fault = None if calm else self._choose()
            size = fault.num_ranks if fault else self.random.choice(self.state.sizes)
            self.state.sizes_of_run.append(size)
            self._start(name, size, fault, {})
            if fault is not None:
                self.state.faults.append({"run": name, "step": self._step(name), **asdict(fault)})
                self.state.faults_in_run += fault.hit
            if self._status(name) == "finished":
                self._check(name)
            else:
                assert fault is not None, f"{name} did not finish undisturbed, see {self.folder / name}.log"
            self._write()

    def _choose(self) -> Fault:
        launcher = self.random.random() < self.state.launcher_share
        kind = self.random.choice(("rank", "all", "point", "point", *(("runner", "node_launcher") * launcher)))
        fault = Fault(
            kind,
            launcher,
            self.random.choice(self.state.sizes),
            after_steps=None if self.random.random() < 0.15 else self.random.randrange(9),
            delay_seconds=self.random.random() * (0.3 if kind != "point" else 0.0),
        )
        if fault.after_steps is None:
            fault.delay_seconds = self.random.uniform(0.0, 12.0 if launcher else 4.0)
        if kind == "point":
            if not self.state.points_left:
                self.state.points_left = self.random.sample(self.state.points, len(self.state.points))
            rank, name = self.state.points_left.pop().split("|", 1)
            fault.point = f"{min(int(rank), fault.num_ranks - 1)}|{self.random.randint(1, 2)}|{name}"
        return fault

    def _start(self, name: str, num_ranks: int, fault: Fault | None, environ: dict[str, str]) -> None:
        """One start of a run to its end, by itself or by ``fault``; afterwards no rank is left."""
        run_dir, log = self.folder / "runs" / name, self.folder / f"{name}.log"
        arguments = ["train", str(self.folder / "run.yaml"), "--resume", "if-any"]
        for setting in (f"run.dir={run_dir}", f"checkpoint.every_steps={EVERY_STEPS}"):
            arguments += ["--set", setting]
        if fault is not None and fault.point is not None:
            environ = {**environ, CRASH_AT: fault.point}
        begin = launched_ranks if fault is not None and fault.launcher else quick_ranks
        with begin(arguments, num_ranks, log, environ) as ranks:
            self._wait_for_ranks(ranks, num_ranks)
            if fault is None or fault.kind == "point":
                started = self._wait_until_one_ends(ranks, num_ranks)
            else:
                started = self._wait_for_the_moment(ranks, run_dir, fault)
                self._kill(ranks, fault)
            deadline, grace = started + LEFT_SECONDS, started + GRACE_SECONDS
            while ranks.alive():
                if not ranks.launcher and time.monotonic() > grace:
                    grace = deadline
                    for rank in ranks.alive():  # what a launcher does with the ranks that one has left behind
                        rank.terminate()
                assert time.monotonic() < deadline, f"ranks are left: {ranks.alive()}, {read_beats(run_dir)}, see {log}"
                time.sleep(POLL_SECONDS)
            if fault is not None:
                fault.seconds = round(time.monotonic() - started, 2)
                fault.hit = fault.hit or (fault.kind == "point" and self._status(name) != "finished")

    def _wait_for_ranks(self, ranks: Ranks, num_ranks: int) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(ranks.alive()) < num_ranks and not (ranks.launcher and not ranks.launchers_alive()):
            assert time.monotonic() < deadline, "the ranks do not start"
            time.sleep(POLL_SECONDS)

    def _wait_until_one_ends(self, ranks: Ranks, num_ranks: int) -> float:
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(ranks.alive()) == num_ranks:
            assert time.monotonic() < deadline, "the run hangs"
            time.sleep(POLL_SECONDS)
        return time.monotonic()

    def _wait_for_the_moment(self, ranks: Ranks, run_dir: Path, fault: Fault) -> float:
        before = len(records(run_dir, "step"))
        deadline = time.monotonic() + LIMIT_SECONDS
        if fault.after_steps is not None:
            while ranks.alive() and len(records(run_dir, "step")) <= before + fault.after_steps:
                assert time.monotonic() < deadline, "the run hangs"
                time.sleep(POLL_SECONDS)
        time.sleep(fault.delay_seconds)
        return time.monotonic()

    def _kill(self, ranks: Ranks, fault: Fault) -> None:
        alive = ranks.alive()
        fault.hit = bool(alive)
        launchers = ranks.launchers_alive()
        victims = {
            "rank": [self.random.choice(alive)] if alive else [],
            "all": [*launchers, *alive],
            "runner": launchers[:1],
            "node_launcher": launchers[-1:],
        }[fault.kind]
        for victim in victims:
            victim.kill()

    def _check(self, name: str) -> None:
        """A run has ended: its weights and its documents."""
        weights, expected = self._export(name), self._export("undisturbed")
        assert weights.keys() == expected.keys()
        difference = max(float(np.abs(weights[key] - expected[key]).max()) for key in expected)
        one_size = set(self.state.sizes_of_run) == {self.state.sizes[0]}
        proved = _in_child(["data", "verify-run", str(self.folder / "runs" / name)], self.folder / f"{name}.verify.log")
        self.state.runs.append(
            {
                "run": name,
                "faults": self.state.faults_in_run,
                "starts": len(self.state.sizes_of_run),
                "one_size": one_size,
                "bit_equal": all(np.array_equal(weights[key], expected[key]) for key in expected),
                "max_difference": difference,
                "proved": proved == 0,
            }
        )
        self.state.faults_in_run, self.state.sizes_of_run = 0, []
        self._write()
        last = self.state.runs[-1]
        assert last["proved"], f"data verify-run does not prove {name}: see {self.folder / name}.verify.log"
        assert last["bit_equal"] if one_size else difference <= MAX_DIFFERENCE, last
        shutil.rmtree(self.folder / "runs" / name / "checkpoints")

    def _export(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        out = self.folder / "exported" / name
        if not out.exists():
            arguments = ["export", str(self.folder / "runs" / name), str(out), "--dtype", "fp32"]
            assert _in_child(arguments, self.folder / f"{name}.export.log") == 0, name
        return {key: value for path in sorted(out.glob("*.safetensors")) for key, value in load_file(path).items()}

    def _status(self, name: str) -> str | None:
        state = read_run_state(self.folder / "runs" / name)
        return None if state is None else str(state["status"])

    def _step(self, name: str) -> int:
        steps = records(self.folder / "runs" / name, "step")
        return int(steps[-1]["step"]) if steps else 0

    def _num_hits(self) -> int:
        return sum(fault["hit"] for fault in self.state.faults)

    def _write(self) -> None:
        write_json(self.path, asdict(self.state))


def _in_child(arguments: Sequence[str], log: Path) -> int:
    with quick_ranks(arguments, 1, log, {}) as ranks:
        process = ranks.quick[0]
        process.join(LIMIT_SECONDS)
        return -1 if process.exitcode is None else process.exitcode


def summary(state: State) -> dict[str, Any]:
    """What a storm has shown so far."""
    hits = [fault for fault in state.faults if fault["hit"]]
    names = {fault["point"].split("|", 2)[2] for fault in hits if fault["point"]}
    return {
        "faults": len(hits),
        "under_deepspeed": sum(fault["launcher"] for fault in hits),
        "by_kind": dict(sorted(Counter(fault["kind"] for fault in hits).items())),
        "points_of_a_save": f"{len(names)} of {len({point.split('|', 1)[1] for point in state.points})}",
        "size_changes": len(set(state.sizes)) > 1,
        "longest_seconds_until_no_rank_was_left": max((fault["seconds"] for fault in hits), default=0.0),
        "runs": len(state.runs),
        "bit_equal_runs": sum(run["bit_equal"] for run in state.runs),
        "max_difference": max((run["max_difference"] for run in state.runs), default=0.0),
        "proved_runs": sum(run["proved"] for run in state.runs),
    }


def run_storm(path: Path, num_faults: int, *, seconds: float, sizes: list[int], launcher_share: float) -> State:
    """Begin or go on with the storm of a state file."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    state = State(**json.loads(path.read_bytes())) if path.exists() else State(17, sizes, launcher_share)
    storm = Storm(path, state)
    storm.prepare()
    storm.go_on(num_faults, time.monotonic() + seconds)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, required=True, help="that must have hit")
    parser.add_argument("--state", type=Path, required=True, help="JSON file; an existing one is gone on with")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before the next fault after so long")
    parser.add_argument("--sizes", default="2", help="numbers of ranks to choose from, e.g. 2,1,3 (first: reference)")
    parser.add_argument("--launcher-share", type=float, default=0.3, help="of the faults, under deepspeed")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    state = run_storm(
        options.state, options.faults, seconds=options.seconds, sizes=sizes, launcher_share=options.launcher_share
    )
    sys.stdout.write(json.dumps(summary(state)) + "\n")


if __name__ == "__main__":
    main()

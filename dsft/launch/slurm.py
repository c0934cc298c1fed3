"""The batch script that trains a run under SLURM: one task a device, saved before the time limit, requeued, resumed.

The script itself is short, so that a user can read and change it. Facts it rests on (SLURM 22.05, `sbatch(1)`):
``--signal`` without ``B:`` goes to the tasks and not to the batch shell; ``--requeue`` restarts the same script after a
node failure or a preemption; ``srun`` returns the highest exit code of its tasks. ``--kill-on-bad-exit`` would kill the
ranks that are a moment behind one that has ended with 75, so a rank that is left alone is ended by ``--wait`` instead.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dsft.constants import EXIT_STOPPED_EARLY
from dsft.errors import ConfigError, LaunchError

DEFAULT_SIGNAL_SECONDS = 300
"""Before the end of the job, where no save has been measured yet."""
LEAST_SIGNAL_SECONDS = 120
LEFT_ALONE_SECONDS = 60
"""How long the other ranks may live after the first one has ended."""
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class Job:
    """What the script asks SLURM for, and what it starts.

    Attributes:
        name: name of the job.
        config: the run's YAML file, as the script gives it to ``dsft train``.
        run_dir: folder of the run: its newest checkpoint decides whether the job resumes and whether it came forward.
        nodes: number of nodes.
        tasks_per_node: ranks on each node, one a device.
        gpus_per_node: 0 asks for none.
        time_limit: as sbatch takes it, for example ``24:00:00`` or ``2-00:00:00``.
        signal_seconds: how long before the time limit the ranks are told to save and stop.
        max_requeues: how often the script puts the job back into the queue.
        python: interpreter of the ranks, the same path on every node.
        cpus_per_task: processors of a rank; None leaves it to the cluster.
        overrides: ``--set`` of the run.
        options: more ``#SBATCH`` options, such as ``--partition=gpu``.
        setup: shell lines before the start, such as ``module load cuda``.
    """

    name: str
    config: str
    run_dir: str
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    time_limit: str
    signal_seconds: int
    max_requeues: int
    python: str
    cpus_per_task: int | None = None
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


def write_script(job: Job) -> str:
    """The text of the batch script.

    Raises:
        ConfigError: the time limit cannot be read, or is too short for the signal before its end.
    """
    limit_seconds = time_limit_seconds(job.time_limit)
    if limit_seconds is not None and limit_seconds <= job.signal_seconds:
        raise ConfigError(
            f"--time {job.time_limit} is {limit_seconds} s, and the ranks are told to save {job.signal_seconds} s "
            "before its end, so that nothing would be trained. Ask for more time, or give --signal-seconds."
        )
    lines = ["#!/bin/bash", "# Written by `dsft slurm`. Change what you like, and submit it with sbatch.", "#"]
    lines += [f"#SBATCH {option}" for option in _sbatch_options(job)]
    lines += ["", *job.setup] if job.setup else []
    return "\n".join(lines) + "\n" + _body(job)


def _sbatch_options(job: Job) -> list[str]:
    options = [f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}"]
    if job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    if job.cpus_per_task is not None:
        options.append(f"--cpus-per-task={job.cpus_per_task}")
    log = _one_word(f"{job.run_dir}-slurm-%j.log")
    options += [f"--time={job.time_limit}", f"--signal=USR1@{job.signal_seconds}", "--requeue", "--open-mode=append"]
    return [*options, f"--output={log}", *job.options]


def _one_word(path: str) -> str:
    return f'"{path}"' if re.search(r"\s", path) else path


def _body(job: Job) -> str:
    world_size = job.nodes * job.tasks_per_node
    train = [job.python, "-m", "dsft", "train", job.config, "--set", f"run.world_size={world_size}"]
    for override in job.overrides:
        train += ["--set", override]
    return f"""
checkpoints={shlex.quote(f"{job.run_dir}/checkpoints")}
newest_checkpoint() {{ ls "$checkpoints" 2>/dev/null | grep -x 'step-[0-9]*' | sort | tail -n 1; }}

trap : TERM USR1  # this shell outlives a signal, so that it can still requeue
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-}}  # srun no longer takes it from the job
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK
before=$(newest_checkpoint)

srun --kill-on-bad-exit=0 --wait={LEFT_ALONE_SECONDS} \\
  {shlex.join(train)} ${{before:+--resume auto}}
code=$?

# {EXIT_STOPPED_EARLY}: stopped on request with everything saved. Only a job that came forward goes back into the queue.
if [ $code -eq {EXIT_STOPPED_EARLY} ] && [ "$(newest_checkpoint)" != "$before" ] &&
  [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_requeues} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def time_limit_seconds(text: str) -> int | None:
    """Seconds of a SLURM time limit; None where there is no limit (``0``, ``UNLIMITED``).

    The forms are ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, and ``days-hours[:minutes[:seconds]]``.

    Raises:
        ConfigError: the text has none of these forms.
    """
    match = _TIME.fullmatch(text.strip())
    if text.strip().upper() in ("UNLIMITED", "INFINITE"):
        return None
    if match is None:
        raise ConfigError(f"--time {text!r} is not a time limit of SLURM; write for example 24:00:00 or 2-12:00:00.")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return (((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds) or None


def measured_signal_seconds(run_dir: Path) -> int:
    """How long before the end of the job its ranks must be told, by what the run's saves and steps have taken so far.

    Three times the longest save and two of the longest steps that ``metrics.jsonl`` knows (a stop is seen at most two
    steps after the signal), and a minute, because SLURM sends the signal up to a minute late or early;
    ``DEFAULT_SIGNAL_SECONDS`` where nothing was saved yet.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return DEFAULT_SIGNAL_SECONDS
    save_seconds = step_seconds = 0.0
    step = 0
    for line in metrics.read_bytes().split(b"\n")[:-1]:  # what follows the last line end may be half a line
        record = json.loads(line)
        if record["kind"] == "checkpoint":
            save_seconds = max(save_seconds, record["write_seconds"])
        elif record["kind"] == "resume":
            step = record["step"]
        elif record["kind"] == "step":
            step_seconds = max(step_seconds, record["seconds"] / max(record["step"] - step, 1))
            step = record["step"]
    if not save_seconds:
        return DEFAULT_SIGNAL_SECONDS
    return max(LEAST_SIGNAL_SECONDS, math.ceil(3 * (save_seconds + 2 * step_seconds)) + 60)


def submit(script: Path) -> str:
    """Hand the script to sbatch; returns the id of the job.

    Raises:
        LaunchError: there is no sbatch here, or it refused.
    """
    try:
        answer = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LaunchError(
            f"sbatch is not on this machine, so {script} was written but not submitted. Log in to a host of the "
            f"cluster and run: sbatch {shlex.quote(str(script))}"
        ) from error
    if answer.returncode != 0:
        raise LaunchError(f"sbatch refused {script}: {answer.stderr.strip()}. Change the options that it names.")
    return answer.stdout.strip().partition(";")[0]

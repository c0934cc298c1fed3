"""Time from ``dsft launch --hostfile`` to the end of the first optimizer step at 1, 2 and 3 hosts, and its parts.

The hosts are network namespaces on this machine, with sshd and pdsh (needs root). They share its processors, so one
host with two ranks stands beside two hosts with one rank each: what differs is the cost of a host and not of a rank.

Parts: ``checks`` until the ``deepspeed`` command is printed; ``launchers`` until the process of rank 0 begins
(deepspeed, pdsh, ssh, the node's launcher); ``imports`` of that process; the phases of ``start.json``; the first batch
and step. ``slowest_host``: how much later than rank 0 the last rank began.

``ranks``: processor seconds that rank 0 spends on making two gloo groups and using each kind of collective once, at 32,
64 and 128 ranks (forks of one process on this machine), with connections made when they are needed, as dsft has it
(TORCH_GLOO_LAZY_INIT), and all at once; and the sockets that it then has. ``ssh``: processor seconds of one ssh client.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the hosts are those of the tests

from dsft.launch.heartbeat import read_beats  # noqa: E402
from tests.support.namespaces import Host, network  # noqa: E402
from tests.support.ranks import free_port  # noqa: E402
from tests.support.tiny_run import records, write_tiny_run  # noqa: E402

NAMES = ("node-a", "node-b", "node-c")


def measure(host: Host, folder: Path, slots: dict[str, int]) -> dict[str, float]:
    """Seconds of each part of one start on the hosts with these slots; ``host`` is the first of them."""
    run_dir = folder / "runs" / "startup"
    shutil.rmtree(run_dir, ignore_errors=True)
    (folder / "hosts.txt").write_text("".join(f"{name} slots={number}\n" for name, number in slots.items()))
    command = [sys.executable, "-m", "dsft", "launch", "--hostfile", "hosts.txt", "run.yaml"]
    for setting in ("train.steps=3", "evaluate={}", f"run.dir={run_dir}"):
        command += ["--set", setting]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    started = time.time()
    process = subprocess.Popen(
        host.command(command, folder), env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = [(time.time(), line) for line in process.stdout]  # the clock is read as each line comes
    if process.wait() != 0:
        sys.exit("the run failed:\n" + "".join(line for _, line in lines)[-6000:])
    launched = next(moment for moment, line in lines if "/deepspeed --master_port" in line)
    began = {rank: beat.start_time for rank, beat in read_beats(run_dir).items()}
    assert len(began) == sum(slots.values())
    phases = json.loads((run_dir / "start.json").read_text())
    step = records(run_dir, "step")[0]
    split = {name.removesuffix("_seconds"): seconds for name, seconds in phases.items()}
    split["first_batch"] = step["data_wait_seconds"]
    split["first_step"] = step["seconds"] - step["data_wait_seconds"]
    before = {"checks": launched - started, "launchers": began[0] - launched}
    total = step["time"] - started
    split = {**before, "imports": total - sum(before.values()) - sum(split.values()), **split, "total": total}
    split["slowest_host"] = max(began.values()) - began[0]
    return {name: round(seconds, 2) for name, seconds in split.items()}


def join(rank: int, num_ranks: int, port: int, answers: Any) -> None:
    """In the fork: make two groups as a run does on the CPU, and use each kind of collective once."""
    import torch
    import torch.distributed as torch_dist

    started = time.process_time()
    torch_dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    group = torch_dist.new_group(backend="gloo")
    value = torch.zeros(8)
    torch_dist.all_reduce(value, group=group)
    torch_dist.broadcast(value, 0, group=group)
    torch_dist.all_gather([torch.zeros(8) for _ in range(num_ranks)], value, group=group)
    torch_dist.barrier(group=group)
    seconds = time.process_time() - started
    files = [os.path.realpath(one.path) for one in os.scandir("/proc/self/fd")]
    if rank == 0:
        answers.put({"seconds": round(seconds, 3), "sockets": sum("socket:" in file for file in files)})
    torch_dist.barrier(group=group)


def groups_of(num_ranks: int, lazy: bool) -> dict[str, float]:
    """Processor seconds and sockets of rank 0."""
    context = multiprocessing.get_context("fork")
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(lazy))
    port, answers = free_port(), context.Queue()
    ranks = [context.Process(target=join, args=(rank, num_ranks, port, answers)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    found: dict[str, float] = answers.get(timeout=300)
    for rank in ranks:
        rank.join(60)
    return found


def ssh_seconds(host: Host, other: str) -> float:
    """Processor seconds of an ssh client on ``host`` that runs nothing on the other one; the mean of ten."""
    script = f"for i in 1 2 3 4 5 6 7 8 9 10; do ssh {other} true; done; times"
    user, system = host.ask("bash", "-c", script).splitlines()[-1].split()  # the second line: of the children
    return round(sum(60 * float(minutes) + float(seconds[:-1]) for minutes, seconds in (
        one.split("m") for one in (user, system))) / 10, 4)  # fmt: skip


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="each of them three times; the medians are given")
    repeats = 3 if parser.parse_args().full else 1
    # DeepSpeed's operations must be there: building them takes a minute, and `make install` has done it.
    subprocess.run([sys.executable, "-m", "dsft.launch.native_ops"], check=True, capture_output=True)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="dsft-hosts-") as name:
        folder = Path(name)
        write_tiny_run(folder)
        (folder / "net").mkdir()
        with network(folder / "net", NAMES) as hosts:
            first = hosts[NAMES[0]]
            measure(first, folder, {NAMES[0]: 1})  # prepares the data and warms the files
            places = {f"{number} hosts": dict.fromkeys(NAMES[:number], 1) for number in (1, 2, 3)}
            for kind, slots in {"1 host, 2 ranks": {NAMES[0]: 2}, **places}.items():
                found = [measure(first, folder, slots) for _ in range(repeats)]
                result[kind] = {part: sorted(one[part] for one in found)[repeats // 2] for part in found[0]}
            ssh = ssh_seconds(first, NAMES[1])
    for kind, split in result.items():
        print(f"{kind:>15}: " + "  ".join(f"{part} {seconds:.1f}" for part, seconds in split.items()))
    ranks = {
        name: {str(number): groups_of(number, lazy) for number in (32, 64, 128)}
        for name, lazy in (("lazy", True), ("at once", False))
    }
    for name, sizes in ranks.items():
        print(f"{name:>15}: " + "  ".join(f"{number} ranks {one}" for number, one in sizes.items()))
    print(json.dumps({"benchmark": "cluster_startup", "unit": "seconds", **result, "ssh": ssh, "ranks": ranks}))


if __name__ == "__main__":
    main()

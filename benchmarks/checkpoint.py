"""What a checkpoint costs, beside DeepSpeed's own on the same disk: ZeRO-3, all state on the CPU, two ranks.

- ``stall_ratio``: how long a save holds up training (beginning it, copying or waiting before the next update,
  committing it; the slower rank) / how long DeepSpeed's ``save_checkpoint`` does. Median of the saves, taken in turn.
- ``final_save_ratio``: a save that is waited for until it is on the disk (end of a run, stop) / DeepSpeed's, which
  does not wait for the disk.
- ``load_ratio``: loading at three ranks what two have saved / DeepSpeed's ``load_checkpoint`` at the same two. Both
  from a dropped page cache, into a fresh engine. Median of the loads, taken in turn; ``load_processor_ratio``: of the
  processor time of all ranks, which tells less of what else the machine does.
- ``read_ratio``: bytes read by all ranks in that load / 12 bytes a parameter.
- ``slowdown_ratio``: 20 steps with one save among them, committed at their end / 20 steps without.
- ``local_stall_ratio``, ``local_final_save_ratio``: a save onto a disk of each host with a copy on the next host
  (``checkpoint.local_dir``; here two folders of one disk) / dsft's own save into one folder, as above.
- ``extra_memory_mib``: by how much the most resident memory of ten steps with two saves in flight is above that of ten
  steps before the first save (the larger rank; steps alone differ by up to 50 MiB), of which ``snapshot_mib`` is
  memory that is kept for the next save (``checkpoint.snapshot_bytes``: at most so much).

``--full`` uses 100 million parameters instead of 20. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 1024
NUM_LAYERS, FULL_NUM_LAYERS = 19, 95
NUM_SAVES = NUM_LOADS = 3
NUM_STEPS = 20
NUM_STEPS_IN_FLIGHT = 5
"""Taken from the begin of a save on; it is committed in so many."""
NUM_WARM_UP_STEPS = 5
"""The memory of a rank grows over the first steps."""
NUM_MEMORY_SAVES = 2
"""The first one allocates what is kept; a second one would show what grows."""
RESHAPED_RANKS = 3


def make_engine(num_layers: int) -> Any:
    """Square layers of about a million parameters each; ZeRO-3, all state on the CPU. Collective."""
    import deepspeed
    import torch

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu", "pin_memory": False},
        },
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)))
    optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), lr=1e-4, adamw_mode=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def train(engine: Any, num_steps: int) -> None:
    """Steps on random vectors."""
    for _ in range(num_steps):
        compute_gradients(engine)
        engine.step()


def compute_gradients(engine: Any) -> None:
    """Forward and backward of one step."""
    import torch

    engine.backward(engine(torch.randn(8, WIDTH)).pow(2).mean())


def seconds_of(groups: Any, action: Callable[[], object]) -> float:
    """Wall time until every rank is through."""
    groups.barrier()
    begin = time.perf_counter()
    action()
    groups.barrier()
    return time.perf_counter() - begin


def load_seconds(groups: Any, action: Callable[[], object]) -> tuple[float, float]:
    """As :func:`seconds_of`, and the processor time of all ranks."""
    begin = time.process_time()
    seconds = seconds_of(groups, action)
    return seconds, sum(groups.all_gather_object(time.process_time() - begin))


def memory_bytes(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(action: Callable[[], object]) -> int:
    """The most resident memory of this process while it acts."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    action()
    return memory_bytes("VmHWM")


def drop_page_cache(folder: Path) -> None:
    """Make the next read of these files come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Saves:
    """dsft's saves, as ``dsft.train.saving`` makes them; each counts for how long it held up training."""

    def __init__(self, engine: Any, groups: Any, folder: Path, memory: Any, disk: Any = None) -> None:
        self.engine, self.groups, self.folder, self.memory, self.disk = engine, groups, folder, memory, disk
        self.stall_seconds = 0.0
        self.num_saves = 0
        self.snapshot: Any = None
        self.pending: Any = None

    def begin(self) -> None:
        """After a step."""
        from dsft.checkpoint.commit import begin
        from dsft.checkpoint.retention import Keep
        from dsft.checkpoint.snapshot import Snapshot

        started = time.perf_counter()
        self.num_saves += 1
        self.snapshot = Snapshot(self.engine, self.memory)
        self.pending = begin(
            self.folder,
            self.num_saves,
            groups=self.groups,
            attempt="benchmark",
            write_payload=self.snapshot.write,
            payload_bytes=self.snapshot.num_bytes,
            state={},
            keep=Keep(last=1),
            disk=self.disk,
        )
        self.stall_seconds = time.perf_counter() - started

    def train(self, num_steps: int) -> None:
        """Steps while a save is in flight. The gather stands for the control message that a step of dsft has anyway."""
        for _ in range(num_steps):
            if self.pending is not None and all(self.groups.all_gather_object(self.pending.is_idle)):
                started = time.perf_counter()
                if self.pending.advance():
                    self.pending = None
                self.stall_seconds += time.perf_counter() - started
            compute_gradients(self.engine)
            started = time.perf_counter()
            self.snapshot.secure()
            self.stall_seconds += time.perf_counter() - started
            self.engine.step()

    def finish(self) -> None:
        """Wait for the commit."""
        if self.pending is not None:
            self.pending.finish()
            self.pending = None

    def save(self) -> None:
        """Begin, and wait for the commit."""
        self.begin()
        self.finish()

    def save_while_training(self) -> None:
        """One save, and steps from its beginning on."""
        self.begin()
        self.train(NUM_STEPS_IN_FLIGHT)
        self.finish()


def measure_saves(groups: Any, folder: Path, num_layers: int) -> dict[str, Any]:
    """Both kinds of save in turn, and what one save does to 20 steps. Leaves one checkpoint of each kind."""
    from dsft.checkpoint.local_disk import open_local_disk
    from dsft.checkpoint.snapshot import SnapshotMemory
    from dsft.config.models import CheckpointSection
    from dsft.dist import without_prints

    engine = make_engine(num_layers)
    train(engine, NUM_WARM_UP_STEPS)
    limit_bytes = CheckpointSection().snapshot_bytes
    memory = SnapshotMemory(limit_bytes)
    saves = Saves(engine, groups, folder / "dsft", memory)
    host = folder / f"host-{groups.rank}"
    (host / "disk").mkdir(parents=True)
    os.chdir(host)  # the same path leads each rank to a disk of its own
    disk = open_local_disk("/proc/self/cwd/disk", folder / "local", "benchmark", groups)
    local_saves = Saves(engine, groups, folder / "local", memory, disk)

    def save_theirs() -> None:
        with without_prints():
            engine.save_checkpoint(str(folder / "deepspeed"), tag="same", save_latest=False)

    plain_bytes = peak_bytes(lambda: train(engine, NUM_MEMORY_SAVES * NUM_STEPS_IN_FLIGHT))
    peaks, first_stalls = [], []
    for _ in range(NUM_MEMORY_SAVES):
        peaks.append(peak_bytes(saves.save_while_training))
        first_stalls.append(max(groups.all_gather_object(saves.stall_seconds)))
    stalls, finals, theirs = [], [], []
    local_stalls, local_finals = [], []
    for _ in range(NUM_SAVES):
        saves.begin()
        saves.train(NUM_STEPS_IN_FLIGHT)
        stalls.append(max(groups.all_gather_object(saves.stall_seconds)))
        saves.finish()
        theirs.append(seconds_of(groups, save_theirs))
        finals.append(seconds_of(groups, saves.save))
        local_saves.begin()
        local_saves.train(NUM_STEPS_IN_FLIGHT)
        local_stalls.append(max(groups.all_gather_object(local_saves.stall_seconds)))
        local_saves.finish()
        local_finals.append(seconds_of(groups, local_saves.save))
    plain_seconds = seconds_of(groups, lambda: train(engine, NUM_STEPS))

    def train_and_save() -> None:
        train(engine, NUM_STEPS - NUM_STEPS_IN_FLIGHT)
        saves.save_while_training()

    with_save_seconds = seconds_of(groups, train_and_save)
    saves.save()
    save_theirs()  # of the same step, for the loads
    kept_bytes = len(memory.take(0, pinned=False))
    return {
        "num_parameters": sum(parameter.ds_numel for parameter in engine.module.parameters()),
        "step_seconds": plain_seconds / NUM_STEPS,
        "first_stall_seconds": first_stalls[0],
        "stall_seconds": statistics.median(stalls),
        "final_save_seconds": statistics.median(finals),
        "deepspeed_save_seconds": statistics.median(theirs),
        "slowdown_ratio": with_save_seconds / plain_seconds,
        "extra_memory_mib": max(groups.all_gather_object(max(peaks) - plain_bytes)) / 2**20,
        "snapshot_mib": kept_bytes / 2**20,
        "snapshot_limit_mib": limit_bytes / 2**20,
        "local_stall_seconds": statistics.median(local_stalls),
        "local_final_save_seconds": statistics.median(local_finals),
    }


def measure_load(groups: Any, folder: Path, num_layers: int) -> dict[str, Any]:
    """dsft's load into a fresh engine, at this number of ranks."""
    from dsft.checkpoint.discover import newest
    from dsft.checkpoint.payload import load_engine

    engine = make_engine(num_layers)
    checkpoint = newest(folder / "dsft")
    assert checkpoint is not None

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # rchar: what read calls returned

    before_bytes = read_bytes()
    seconds, processor_seconds = load_seconds(groups, lambda: load_engine(engine, checkpoint, groups))
    return {
        "load_seconds": seconds,
        "load_processor_seconds": processor_seconds,
        "bytes_read": sum(groups.all_gather_object(read_bytes() - before_bytes)),
    }


def measure_deepspeed_load(groups: Any, folder: Path, num_layers: int) -> dict[str, Any]:
    """DeepSpeed's load into a fresh engine, at the number of ranks that saved."""
    from dsft.dist import without_prints

    engine = make_engine(num_layers)
    with without_prints():
        seconds, processor_seconds = load_seconds(
            groups, lambda: engine.load_checkpoint(str(folder / "deepspeed"), tag="same")
        )
    return {"deepspeed_load_seconds": seconds, "deepspeed_load_processor_seconds": processor_seconds}


PHASES = {"saves": measure_saves, "load": measure_load, "deepspeed_load": measure_deepspeed_load}


def run_rank(phase: str, folder: Path, num_layers: int) -> None:
    """One rank of a phase; rank 0 prints the result."""
    import torch

    from dsft import dist
    from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops
    from dsft.world import discover_world

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=True), "cpu")
    groups = dist.init(discover_world(os.environ, None), "cpu")
    result = PHASES[phase](groups, folder, num_layers)
    if groups.rank == 0:
        print(json.dumps(result), flush=True)
    groups.close()


def run_phase(phase: str, num_ranks: int, folder: Path, num_layers: int) -> dict[str, Any]:
    """Run a phase in ``num_ranks`` processes and return rank 0's result."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        place = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_SIZE": num_ranks}
        environ = {key: str(value) for key, value in {**place, "MASTER_PORT": port}.items()}
        environ |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder), "--layers", str(num_layers)]
        ranks.append(subprocess.Popen(command, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode != 0 for process in ranks):
        raise SystemExit(f"phase {phase} failed: exit codes {[process.returncode for process in ranks]}")
    result: dict[str, Any] = json.loads(outputs[0].strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="100 million parameters instead of 20")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        run_rank(arguments.phase, arguments.folder, arguments.layers)
        return
    num_layers = FULL_NUM_LAYERS if arguments.full else NUM_LAYERS
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name).absolute()
        found = run_phase("saves", 2, folder, num_layers)
        loads = []
        for _ in range(NUM_LOADS):
            drop_page_cache(folder)
            ours = run_phase("load", RESHAPED_RANKS, folder, num_layers)
            drop_page_cache(folder)
            loads.append(ours | run_phase("deepspeed_load", 2, folder, num_layers))
        found |= {key: statistics.median(one[key] for one in loads) for key in loads[0]}
    found["stall_ratio"] = found["stall_seconds"] / found["deepspeed_save_seconds"]
    found["final_save_ratio"] = found["final_save_seconds"] / found["deepspeed_save_seconds"]
    found["local_stall_ratio"] = found["local_stall_seconds"] / found["stall_seconds"]
    found["local_final_save_ratio"] = found["local_final_save_seconds"] / found["final_save_seconds"]
    found["load_ratio"] = found["load_seconds"] / found["deepspeed_load_seconds"]
    found["load_processor_ratio"] = found["load_processor_seconds"] / found["deepspeed_load_processor_seconds"]
    found["read_ratio"] = found["bytes_read"] / (12 * found["num_parameters"])
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))


if __name__ == "__main__":
    main()

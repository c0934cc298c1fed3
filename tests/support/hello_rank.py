"""Started by real launchers: finds its world, joins, adds up, and writes what it found. Needs no model."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dsft.dist import discover_world, init
from dsft.launch.native_ops import needed_ops, prepare_deepspeed_ops

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    world = discover_world(os.environ, options.local_rank)
    prepare_deepspeed_ops(needed_ops("cpu", cpu_adam=False), "cpu")
    groups = init(world, "cpu")
    total = groups.sum(np.array([world.rank + 1.0]))
    found = {**asdict(groups.world), "sum": float(total[0]), "pids": groups.all_gather_object(os.getpid())}
    (options.folder / f"{world.rank}.json").write_text(json.dumps(found))
    groups.close()

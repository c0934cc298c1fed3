"""Settings that every test shares; set before anything imports torch or DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(REPOSITORY))  # so that `tests.support` can be imported

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share few cores; one thread also makes sums reproducible
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# A machine that only checks its GPU (`make gpu-check`) may have torch alone.
DEEPSPEED = version("deepspeed") if importlib.util.find_spec("deepspeed") else "none"

# Private and versioned: an op built for another torch would be loaded, and a lock that a killed process of another
# program left in the shared default folder would hang every test.
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    str(
        REPOSITORY
        / "build"
        / f"torch-extensions-py{platform.python_version()}-torch{version('torch')}-deepspeed{DEEPSPEED}"
    ),
)


LONG = {"slow", "launch", "cluster"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first: pytest-xdist would begin a file of one long test last, and wait for it alone."""
    long = {item.path for item in items if LONG & {mark.name for mark in item.iter_markers()}}
    items.sort(key=lambda item: item.path not in long)

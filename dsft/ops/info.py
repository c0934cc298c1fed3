"""What is built, for which processors, and which implementation each operation would use and why."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from dsft.errors import KernelError
from dsft.ops import build

KERNELS = ("pack_sequences", "expand_loss_mask", "masked_cross_entropy_rows_")
"""Operations that have a kernel in both libraries."""


def describe() -> dict[str, Any]:
    """Libraries and operations, as ``kernels: auto`` would use them. Builds and loads nothing."""
    libraries = {
        "cpu": _library(build.cpu_library_path, _cpu_architectures()),
        "cuda": _library(build.cuda_library_path, _cuda_architectures()),
    }
    cuda = _cuda_device(libraries["cuda"])
    rows = {name: {"cpu": _backend(libraries["cpu"]), "cuda": cuda} for name in KERNELS}
    composite = "torch's matrix products, and masked_cross_entropy_rows_"
    rows["masked_linear_cross_entropy"] = {"cpu": composite, "cuda": composite}
    return {
        "torch": torch.__version__,
        "sources": _or_reason(build.source_folder),
        "libraries": libraries,
        "operations": rows,
    }


def _library(path: Any, architectures: list[str]) -> dict[str, Any]:
    try:
        where: Path = path()
    except KernelError as error:
        return {"built": False, "missing": str(error)}
    return {"built": where.exists(), "path": str(where), "architectures": architectures}


def _backend(library: dict[str, Any]) -> str:
    if "missing" in library:
        return f"reference: {library['missing']}"
    return "native" if library["built"] else "native, once it is built: dsft ops build, or at the first use"


def _cuda_device(library: dict[str, Any]) -> str:
    if not torch.cuda.is_available():
        return "not used: torch finds no CUDA device" + ("" if torch.version.cuda else " (this torch is built without)")
    major, minor = torch.cuda.get_device_capability()
    found = f"sm_{major}{minor}"
    if 10 * major + minor < int(build.CUDA_ARCHITECTURES[0]):
        return f"reference: the device is an {found}, older than all that is built"
    # Code for one sm runs on later minor versions of the same major one; others start from the PTX.
    same = any(int(number) // 10 == major and int(number) % 10 <= minor for number in build.CUDA_ARCHITECTURES)
    return f"{_backend(library)} ({found}{'' if same else ', compiled from PTX by the driver'})"


def _cpu_architectures() -> list[str]:
    return list(build.CPU_ARCHITECTURES) if platform.machine() == "x86_64" else [platform.machine()]


def _cuda_architectures() -> list[str]:
    return [*(f"sm_{number}" for number in build.CUDA_ARCHITECTURES), f"compute_{build.CUDA_ARCHITECTURES[-1]} (PTX)"]


def _or_reason(find: Any) -> str:
    try:
        return str(find())
    except KernelError as error:
        return str(error)

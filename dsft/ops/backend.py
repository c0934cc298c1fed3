"""Which implementation dsft's operations use: chosen once, said once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from ctypes import CDLL
from typing import Literal

from dsft.errors import KernelError, SaveError
from dsft.ops.native import load_cpu_library, load_cuda_library

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "native", "reference"]
Backend = Literal["native", "reference"]

_chosen: Backend | None = None
_asked: Kernels = "auto"
_cuda: CDLL | None = None
_cuda_is_chosen = False


def choose(kernels: Kernels, device_type: str = "cpu") -> Backend:
    """Choose the backend of all operations of this process, build what is missing, and log the choice.

    Args:
        kernels: native: the built libraries, or an error; reference: Python; auto: native, and where that cannot be
            had, the reference with a loud warning.
        device_type: cuda: the library for the GPU too, now rather than in the first forward (a build takes minutes).

    Returns:
        The backend of operations on CPU tensors.

    Raises:
        KernelError: native kernels were asked for and cannot be built or loaded (with the compiler's output).
    """
    global _chosen, _asked, _cuda_is_chosen
    _asked, _cuda_is_chosen = kernels, False
    chosen: Backend = "reference"
    if kernels != "reference" and _loaded(load_cpu_library, "dsft's operations") is not None:
        chosen = "native"
    if chosen != _chosen:
        logger.info("dsft's operations: %s (kernels: %s)", chosen, kernels)
    _chosen = chosen
    if device_type == "cuda":
        cuda_library()
    return chosen


def current() -> Backend:
    """The backend in use; chosen as ``auto`` if nobody has chosen."""
    return _chosen or choose("auto")


def cuda_library() -> CDLL | None:
    """The CUDA library of operations on tensors of a GPU; None: they run as their reference.

    Raises:
        KernelError: native kernels were asked for, and the library cannot be built or loaded.
    """
    global _cuda, _cuda_is_chosen
    current()
    if not _cuda_is_chosen:
        _cuda = None
        if _asked != "reference":
            _cuda = _loaded(load_cuda_library, "dsft's operations on the GPU")
        _cuda_is_chosen = True
        logger.info(
            "dsft's operations on the GPU: %s (kernels: %s)", "native" if _cuda is not None else "reference", _asked
        )
    return _cuda


def _loaded(load: Callable[[], CDLL], what: str) -> CDLL | None:
    """The library, or None after a loud warning where the reference may take its place."""
    try:
        return load()
    except (KernelError, SaveError) as error:
        if _asked == "native":
            raise
        logger.warning("SLOW: %s run as their Python reference, not natively: %s", what, error)
        return None

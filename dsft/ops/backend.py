"""Which implementation dsft's operations use: chosen once, said once."""

from __future__ import annotations

import logging
from ctypes import CDLL
from typing import Literal

from dsft.errors import KernelError, SaveError
from dsft.ops.native import load_cpu_library, load_cuda_library

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "native", "reference"]
Backend = Literal["native", "reference"]

_chosen: Backend | None = None
_asked: Kernels = "auto"
_cuda_fails = False


def choose(kernels: Kernels) -> Backend:
    """Choose the backend of all operations of this process and log it.

    Args:
        kernels: native: the built library, or an error; reference: Python; auto: native, and where that cannot be had,
            the reference with a loud warning.

    Raises:
        KernelError: native kernels were asked for and cannot be built or loaded (with the compiler's output).
    """
    global _chosen, _asked, _cuda_fails
    _asked, _cuda_fails = kernels, False
    chosen: Backend = "reference"
    if kernels != "reference":
        try:
            load_cpu_library()
            chosen = "native"
        except (KernelError, SaveError) as error:
            if kernels == "native":
                raise
            logger.warning("SLOW: dsft's operations run as their Python reference, not natively: %s", error)
    if chosen != _chosen:
        logger.info("dsft's operations: %s (kernels: %s)", chosen, kernels)
    _chosen = chosen
    return chosen


def current() -> Backend:
    """The backend in use; chosen as ``auto`` if nobody has chosen."""
    return _chosen or choose("auto")


def cuda_library() -> CDLL | None:
    """The CUDA library of operations on tensors of a GPU; None: they run as their reference.

    Raises:
        KernelError: native kernels were asked for, and the library cannot be built or loaded.
    """
    global _cuda_fails
    if current() == "reference" or _cuda_fails:
        return None
    try:
        return load_cuda_library()
    except (KernelError, SaveError) as error:
        if _asked == "native":
            raise
        _cuda_fails = True
        logger.warning("SLOW: dsft's operations on the GPU run as their Python reference, not natively: %s", error)
        return None

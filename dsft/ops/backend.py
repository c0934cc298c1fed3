"""Which implementation dsft's operations use: chosen once, said once."""

from __future__ import annotations

import logging
from typing import Literal

from dsft.errors import KernelError, SaveError
from dsft.ops.native import load_cpu_library

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "native", "reference"]
Backend = Literal["native", "reference"]

_chosen: Backend | None = None


def choose(kernels: Kernels) -> Backend:
    """Choose the backend of all operations of this process and log it.

    Args:
        kernels: native: the built library, or an error; reference: Python; auto: native, and where that cannot be had,
            the reference with a loud warning.

    Raises:
        KernelError: native kernels were asked for and cannot be built or loaded (with the compiler's output).
    """
    global _chosen
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

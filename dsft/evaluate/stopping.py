"""A stop that is asked for while a model is measured: the evaluation ends between two batches, on all ranks alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsft.errors import StoppedEarly

if TYPE_CHECKING:
    from dsft.dist import Groups
    from dsft.launch.stop import StopFlag


def end_if_asked(stop: StopFlag | None, groups: Groups) -> None:
    """Raise StoppedEarly on every rank if one of them was asked to stop. Collective; without a flag nothing is asked.

    One small message over the CPU a batch, which is little beside a forward.
    """
    if stop is None:
        return
    everyones = groups.post(np.array([stop.requested is not None], dtype=np.int64)).wait()
    if everyones.any():
        raise StoppedEarly("the evaluation was ended on request; what it had measured is not kept.")

"""``train.spikes``: when the training loss counts as broken, and how far a run then goes back."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dsft.config.section import PositiveFloat, Section


class SpikeSection(Section):
    """Go back to an older checkpoint when the loss spikes, and pass over the data that caused it.

    As PaLM was trained (Chowdhery et al. 2022, section 5.1: from a checkpoint about 100 steps before the spike, without
    the 200 to 500 batches about it). The run goes on there with the data that comes after the spike.
    """

    window_steps: Annotated[int, Field(ge=4, le=10_000)] = 100
    """A step's loss is compared with those of so many steps before it, of the same stage of ``data.stages``; nothing is
    a spike before there are so many."""
    deviations: PositiveFloat = 8.0
    """A loss is high when it is so many deviations above their median. Deviation: 1.4826 times the median distance from
    the median (for a normal distribution its standard deviation), at least 1 % of the median."""
    confirm_steps: Annotated[int, Field(ge=1)] = 5
    """So many high losses in a row are a spike; one alone is a hard batch. So are ``train.max_skipped_steps`` steps in
    a row that are not finite. No checkpoint is made from the first of them on."""
    rewind_steps: Annotated[int, Field(ge=0)] = 100
    """The checkpoint is at least so many steps older than the first high loss; where none is left that is so old, the
    oldest one (``checkpoint.keep_last``)."""
    max_roll_backs: Annotated[int, Field(ge=1)] = 3
    """In all of the run; a spike after them ends it."""

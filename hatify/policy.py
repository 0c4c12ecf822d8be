"""The policies: what happens to a parameter or buffer when tasks come and go."""

from __future__ import annotations

from enum import Enum


class Policy(str, Enum):
    """How a parameter or buffer is kept from changing what finished tasks answer."""

    #: Shared; an entry is locked where a finished task has the feature it writes and the feature it reads on (Eq. 2).
    SHARED = "shared"
    #: Shared; all entries of an output feature that a finished task has on are locked.
    ROW = "row"
    #: Shared output layer without a mask; entries that read a feature that is on are locked.
    UNMASKED = "unmasked"
    #: A raw parameter, multiplied by the masks of its features where it is read; shared and locked by them.
    MASKED = "masked"
    #: A normalisation: one copy per task, over the active features.
    NORM = "norm"
    #: An output layer: one per task.
    HEAD = "head"
    #: One copy per task.
    PER_TASK = "per_task"
    #: A buffer that the forward pass does not write to.
    CONSTANT = "constant"
    #: Not read by the forward pass.
    UNUSED = "unused"

    def __str__(self) -> str:
        return self.value


#: What ``policies=`` accepts.
SELECTABLE = (Policy.SHARED, Policy.ROW, Policy.UNMASKED, Policy.HEAD, Policy.PER_TASK)
#: Those under which each task has a copy of its own.
OWN = (Policy.NORM, Policy.HEAD, Policy.PER_TASK)
#: Those of weighted layers whose weights tasks share.
SHARING = (Policy.SHARED, Policy.ROW, Policy.UNMASKED)

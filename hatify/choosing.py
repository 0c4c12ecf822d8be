"""Which features the open task takes: those that matter most to it, as many as its share allows.

All that finished tasks own is there to be read. Of what is free a task tries everything for its first few steps, and
then keeps its share: the features whose gates change the loss most, to first order. From then on its masks are those it
will answer with, so that weights and running statistics settle on them. Gates are 0 or 1 throughout, and nothing of
this depends on the optimizer or its rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hatify.gate import EMBEDDING_LIMIT

#: How many steps a task tries all features for: enough to tell what matters from what does not, and few enough to be
#: over soon in a short task, since what is dropped has been trained in vain.
TRIAL = 10
#: What the importance of a feature cannot fall below, in units of its layer's mean: above zero means on.
LEAST = 1e-3
#: The embedding of a feature that was dropped: so low that it stays below zero when a copy that averages the model over
#: its steps, and had the feature on, comes to average it.
DROPPED = -1e30


@dataclass
class Course:
    """How the open task comes to its masks, and how far it has come.

    Attributes:
        learned: by their gradient, as in the paper, or set by hand: the embeddings are the optimizer's.
        chosen: they are there.
        steps: for how many steps features have been tried.
        budget: how much of what is free in each layer it may keep: {layer: share}; for others, the usual share.
    """

    learned: bool = False
    chosen: bool = False
    steps: int = 0
    budget: Mapping[str, float] | None = None


class Chooser:
    """Finds out how much each feature matters to the open task, and what it has beyond its budget.

    Args:
        embedding: e of the task, shape (features,), above zero where a feature is on; there it becomes how much the
            feature matters, in units of its layer's mean.
        course: how the task comes to its masks.
        layer: the index of each feature's layer, int64, shape (features,), ascending.
        names: of the layers.
        used: features that others own, bool, shape (features,).
        share: what the task may keep of each layer, unless its course says otherwise.
    """

    def __init__(
        self, embedding: Tensor, course: Course, layer: Tensor, names: tuple[str, ...], used: Tensor, share: float
    ) -> None:
        self.embedding, self.course, self.layer, self.used = embedding.detach(), course, layer, used
        free, owned = (
            torch.zeros(len(names), dtype=torch.int64, device=layer.device).index_add(0, layer, of.to(torch.int64))
            for of in (~used, used)
        )
        counts = zip(names, free.tolist(), owned.tolist(), strict=True)
        number = [allowed((course.budget or {}).get(name, share), left, taken) for name, left, taken in counts]
        #: How many features of each layer may be kept, int64, shape (layers,).
        self.number = torch.tensor(number, dtype=torch.int64, device=layer.device)

    def observe(self, change: Tensor) -> None:
        """Note how much the loss changes with each gate, from one step: shape (features,), not negative."""
        self.course.steps += 1
        e, layers = self.embedding, len(self.number)
        matters = relative(change.to(e.dtype), self.layer, layers)
        e.copy_(torch.where(e > 0, e.lerp(matters, 1 / self.course.steps).clamp(LEAST, EMBEDDING_LIMIT), e))

    def surplus(self) -> Tensor:
        """The free features that are on beyond the budget, those that matter least, bool, shape (features,)."""
        free = (self.embedding > 0) & ~self.used
        return free & ~strongest(self.embedding, free, self.number, self.layer)

    def drop(self, features: Tensor) -> None:
        """Switch `features` off, bool, shape (features,)."""
        self.embedding.masked_fill_(features, max(DROPPED, torch.finfo(self.embedding.dtype).min))


def allowed(share: float, free: int, owned: int) -> int:
    """How many of the `free` features of a layer a task may keep: at most its `share` of them, and at least one.

    None are kept only if the share is nothing, and there are features that others own to be read in their place.
    """
    least = 0 if share == 0 and owned else 1
    # Without the rounding of products such as 0.1 · 30.
    return min(free, max(least, math.floor(share * free + 1e-6)))


def relative(change: Tensor, layer: Tensor, layers: int) -> Tensor:
    """`change`, shape (features,), in units of its layer's mean; ones where a layer has none.

    Before weights that are zero, for example, gates change nothing at first.
    """
    size = change.nan_to_num(0, 0, 0)
    total, count = (size.new_zeros(layers).index_add(0, layer, of) for of in (size, torch.ones_like(size)))
    mean = (total / count.clamp_min(1))[layer]
    return torch.where(mean > 0, size / mean.clamp_min(torch.finfo(size.dtype).tiny), 1)


def strongest(score: Tensor, free: Tensor, number: Tensor, layer: Tensor) -> Tensor:
    """The `number` free features of each layer with the highest scores, bool, shape (features,).

    Args:
        score: shape (features,).
        free: those to choose from, bool, shape (features,).
        number: how many of each layer, int64, shape (layers,).
        layer: the index of each feature's layer, int64, shape (features,), ascending.
    """
    order = score.masked_fill(~free, -torch.inf).argsort(descending=True, stable=True)
    order = order[layer[order].argsort(stable=True)]
    sizes = layer.new_zeros(len(number)).index_add(0, layer, torch.ones_like(layer))
    rank = torch.arange(len(layer), device=layer.device) - (sizes.cumsum(0) - sizes)[layer]
    keep = torch.zeros_like(free)
    keep[order] = rank < number[layer]
    return keep & free

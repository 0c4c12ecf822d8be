"""Axes: the dimensions of values in a graph, which of their indices are kept, and what relates them.

Every dimension of every value in a graph is an axis. Axes that must lose the same indices are one axis; other
operations relate axes (a concatenation, a reshape, the groups of a convolution).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Axis:
    """The indices of a dimension that are kept: ``kept``, bool, shape (size,)."""

    def __init__(self, size: int) -> None:
        self._kept = torch.full((size,), size == 1)
        self._same: Axis | None = None

    def _root(self) -> Axis:
        while self._same is not None:
            self = self._same
        return self

    @property
    def kept(self) -> Tensor:
        return self._root()._kept

    @property
    def index(self) -> Tensor:
        """The kept indices, int64."""
        return self.kept.nonzero().squeeze(1)

    @property
    def cut(self) -> bool:
        """Whether any index is left out."""
        return not bool(self.kept.all())

    def keep(self, needed: Tensor | bool = True) -> bool:
        """Keep the indices at which `needed` is True, too; whether that changed anything."""
        root = self._root()
        before, root._kept = root._kept, root._kept | needed
        return not torch.equal(before, root._kept)

    def join(self, other: Axis) -> None:
        """From now on, the two are one axis."""
        a, b = self._root(), other._root()
        if a is not b:
            a.keep(b._kept)
            b._same = a


class Dims(list[Axis]):
    """The axes of a tensor."""

    def keep(self) -> None:
        for axis in self:
            axis.keep()


class Relation(Protocol):
    """What holds between axes that are not one."""

    def grow(self) -> bool:
        """Keep what follows from what is kept; whether that changed anything."""


@dataclass
class Moved:
    """An operation that moves elements.

    Attributes:
        sources: axes of the input, each with its index + 1 for every element of the output (0: from elsewhere).
        out: axes of the output; those that no source varies along do not matter.
    """

    sources: list[tuple[Axis, Tensor]]
    out: Dims

    def grow(self) -> bool:
        shape = torch.broadcast_shapes(*(index.shape for _, index in self.sources))
        inside = torch.ones(shape, dtype=torch.bool)
        arrives = inside.clone()
        for axis, index in self.sources:
            inside &= index > 0
            arrives &= axis.kept[(index - 1).clamp(min=0)]
        changed = False
        needed = inside.clone()
        for d, size in enumerate(shape):
            if size > 1:
                changed |= self.out[d].keep(any_but(arrives & inside, d))
                needed &= self.out[d].kept.view(-1, *(1,) * (len(shape) - 1 - d))
        for axis, index in self.sources:
            asked = torch.zeros_like(axis.kept)
            asked[index.expand(shape)[needed] - 1] = True
            changed |= axis.keep(asked)
        return changed


@dataclass
class Grouped:
    """Input and output features in groups, of which each keeps equally many, or none."""

    read: Axis
    written: Axis
    groups: int
    nonzero: Tensor

    def grow(self) -> bool:
        read, written, nonzero = (t.view(self.groups, -1) for t in (self.read.kept, self.written.kept, self.nonzero))
        read = read | (nonzero & written.any(1, keepdim=True))
        alive = (read.any(1) | written.any(1)).unsqueeze(1)
        changed = [
            axis.keep(_levelled(kept, alive).flatten()) for axis, kept in ((self.read, read), (self.written, written))
        ]
        return any(changed)


def _levelled(kept: Tensor, alive: Tensor) -> Tensor:
    """`kept` (groups, features) with as many features in each group that is alive as the fullest has, at least one."""
    count = max(1, int(kept.sum(1).max()))
    first = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return kept | (torch.zeros_like(kept).scatter(1, first, True) & alive)


def any_but(value: Tensor, dim: int) -> Tensor:
    """Whether anything is True at each index along `dim`."""
    return value.movedim(dim, 0).reshape(value.shape[dim], -1).any(1)

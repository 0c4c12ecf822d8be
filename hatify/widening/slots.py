"""The slots of a network that has grown: those it had, in new places, and one for each feature that is new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hatify.slots import Layout, Use
from hatify.widening.composed import Axis, Grown, Growth, Key, composed, grown


class CannotFollow(Exception):
    """Features cannot be told any more once these atoms have grown."""

    def __init__(self, axes: Iterable[Axis]) -> None:
        self.axes = list(axes)


class WiderSlots:
    """Turns slots into those of the network that has grown.

    Args:
        layout: the slots there were.
        axes: the axes of the features of each mask.
        growth: what grows.

    Raises:
        CannotFollow: a mask cannot grow along.
    """

    def __init__(self, layout: Layout, axes: Mapping[str, Sequence[Axis]], growth: Growth) -> None:
        self._count = layout.num_slots
        #: {slot: {what makes it new: the slot of a feature like its own}}
        self._copies: dict[int, dict[Key, int]] = {}
        self._next = self._count + 1
        masks = {name: torch.arange(*bounds)[:, None] for name, bounds in layout.groups.items()} | layout.indices
        wide = {name: grown(composed(axes[name]), growth) for name in masks if name in axes}
        for name, slots in masks.items():
            if name in wide and wide[name].along and slots.shape[1] == 1:
                self._add(slots[:, 0], wide[name])
        groups: dict[str, tuple[int, int]] = {}
        final = torch.full((self._next,), -1)
        start = 0
        for name in layout.groups:
            own = self._wide(masks[name], [wide.get(name)])[:, 0]
            if name not in wide:
                copies = [copy for slot in own.tolist() for copy in self._copies.get(slot, {}).values()]
                own = torch.cat((own, torch.tensor(copies, dtype=torch.int64)))
            final[own] = torch.arange(start, start + len(own))
            groups[name] = start, start + len(own)
            start += len(own)
        final[self._count] = start
        if bool((final < 0).any()):
            lost = int((final < 0).nonzero()[0])
            keys = (key for copies in self._copies.values() for key, copy in copies.items() if copy == lost)
            raise CannotFollow(atom for atom, _ in next(keys))
        self._final = final
        self.layout = Layout(
            groups, {n: final[self._wide(index, [wide.get(n)])] for n, index in layout.indices.items()}
        )

    @property
    def before(self) -> Tensor:
        """Where each slot has gone, int64, shape (slots before,)."""
        return self._final[: self._count]

    def use(self, use: Use, dims: Sequence[Grown | None]) -> Use:
        """A use of a parameter whose dimensions have grown."""
        written, read = (None if t is None else self._final[self._wide(t, dims)] for t in (use.written, use.read))
        assert written is not None
        return Use(written, read)

    def _add(self, slots: Tensor, axis: Grown) -> None:
        """New slots for the features of a mask that are new: those of one slot stay together."""
        new = axis.is_new
        before = slots[axis.like[~new]]
        for atom, along in axis.along.items():
            pairs = torch.stack((before, along[~new]), 1)[(along[~new] >= 0) & (before < self._count)].unique(dim=0)
            if len(pairs) > len(pairs[:, 0].unique()):
                raise CannotFollow([atom])  # one slot at several indices: what is new would be more of the same
        for index, key in sorted(axis.keys.items()):
            slot = int(slots[axis.like[index]])
            if slot < self._count and key not in self._copies.setdefault(slot, {}):
                self._copies[slot][key] = self._next
                self._next += 1

    def _wide(self, slots: Tensor, dims: Sequence[Grown | None]) -> Tensor:
        """A table of slots, shape (*dims, K), whose dimensions of more than one index have grown."""
        new = torch.zeros((1,) * len(dims), dtype=torch.bool)
        varying = {}
        for d, axis in enumerate(dims):
            if axis is not None and axis.along and slots.shape[d] > 1:
                slots = slots.index_select(d, axis.like)
                varying[d] = axis
                new = new | axis.is_new.view([-1 if e == d else 1 for e in range(len(dims))])
        slots = slots.clone()
        for place in new.expand(slots.shape[:-1]).nonzero().tolist() if varying else ():
            key = frozenset().union(*(axis.keys.get(place[d], ()) for d, axis in varying.items()))
            at = tuple(place)
            slots[at] = torch.tensor([self._copy(slot, key) for slot in slots[at].tolist()])
        return slots

    def _copy(self, slot: int, key: Key) -> int:
        """The slot of the feature that is new by `key` and like that of `slot`; itself, if nothing is like it."""
        fitting = [known for known in self._copies.get(slot, ()) if known <= key]
        return self._copies[slot][max(fitting, key=len)] if fitting else slot

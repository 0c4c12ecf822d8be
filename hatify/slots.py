"""Slots: where each feature's mask is in the flat vector of all masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hatify.labels import ON, ZERO, Classes, LabelSpace


@dataclass(frozen=True)
class Layout:
    """Where each mask is in the flat vector of all slots.

    Attributes:
        groups: {layer or raw parameter: its range of slots}, without gaps; Equation 5 sums over these.
        indices: masks that are no group: {name: slots (features, K)}; a feature is on where one of its K slots is.
            Slot ``num_slots`` is always on.
    """

    groups: dict[str, tuple[int, int]]
    indices: dict[str, Tensor]

    @property
    def num_slots(self) -> int:
        """How many features are masked separately."""
        return max((stop for _, stop in self.groups.values()), default=0)


@dataclass(frozen=True)
class Use:
    """One way a shared parameter is used: the slots each entry writes and reads, broadcastable to (*shape, K)."""

    written: Tensor
    read: Tensor | None


class Slots:
    """Turns labels into slots and hands out mask names."""

    def __init__(self, space: LabelSpace, classes: Classes) -> None:
        self.space = space
        self.classes = classes
        self.groups: dict[str, tuple[int, int]] = {}
        self.indices: dict[str, Tensor] = {}
        self.slot_of = torch.full((classes.features,), -1)
        start = 0
        for owner, leaves in space.features.items():
            roots = classes.of(torch.arange(leaves.first, leaves.first + leaves.count))
            own = torch.unique(roots[self.slot_of[roots] < 0])
            self.slot_of[own] = torch.arange(start, start + own.numel())
            if own.numel():
                self.groups[owner] = (start, start + own.numel())
                start += own.numel()
        self.count = start

    def of(self, labels: Tensor) -> Tensor:
        """Slots (*labels.shape, K): `count` for what is always on, and (harmlessly) for what is always zero."""
        roots = self.classes.of(labels.clamp(min=ZERO))
        slots = torch.where(roots > ON, self.slot_of[roots.clamp(max=self.classes.features - 1)], self.count)
        sets, position = labels[labels < ZERO].unique(return_inverse=True)
        rows = [self._members(label) for label in sets.tolist()]
        width = max(map(len, rows), default=1)
        slots = slots.unsqueeze(-1).repeat(*(1,) * labels.ndim, width)
        if rows:
            slots[labels < ZERO] = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])[position]
        return slots

    def written_by(self, owner: str, features: int) -> Tensor:
        """Slots (features, K) of what a layer writes; always on for a layer without a mask."""
        leaves = self.space.features.get(owner)
        if leaves is None:
            return torch.full((features, 1), self.count)
        return self.of(torch.arange(leaves.first, leaves.first + leaves.count))

    def _members(self, label: int) -> list[int]:
        """The slots of a set of leaves."""
        members = self.of(torch.tensor(sorted(self.space.members(label))))
        return [self.count] if (members == self.count).any() else members.unique().tolist()

    def name(self, owner: str, slots: Tensor) -> str | None:
        """The name of the mask with these slots (features, K): a group's, or a new one; None if it is always on."""
        if bool((slots == self.count).any(1).all()):
            return None
        if slots.shape[1] == 1:
            flat = slots[:, 0]
            for group, (start, stop) in self.groups.items():
                if flat.numel() == stop - start and torch.equal(flat, torch.arange(start, stop)):
                    return group
        for known, index in self.indices.items():
            if index.shape == slots.shape and torch.equal(index, slots):
                return known
        name, suffix = owner, 1
        while name in self.groups or name in self.indices:
            suffix += 1
            name = f"{owner}#{suffix}"
        self.indices[name] = slots
        return name

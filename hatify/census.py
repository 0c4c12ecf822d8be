"""The census of a network: every parameter and buffer, and what happens to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from hatify.policy import Policy


@dataclass(frozen=True)
class Entry:
    """One line of the census: a parameter or buffer of the original network, and what happens to it."""

    name: str
    kind: str  # "parameter" or "buffer"
    policy: Policy
    shape: tuple[int, ...]
    reason: str


class Census(tuple[Entry, ...]):
    """Every parameter and buffer of the original network with its policy; prints as a table.

    Attributes:
        flat: (path, reason) of every block of the original that is no part of its own in the converted model.
    """

    flat: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        width = max((len(e.name) for e in self), default=4)
        lines = [f"{e.name:<{width}}  {e.kind:<9}  {e.policy:<9}  {e.shape!s:<18}  {e.reason}" for e in self]
        flat = [f"{path}: no part of its own, since {reason}" for path, reason in self.flat]
        return "\n".join([*lines, "", *flat, self.summary()])

    def summary(self) -> str:
        """Elements per policy, in one line."""
        counts: Counter[str] = Counter()
        for entry in self:
            counts[str(entry.policy)] += torch.Size(entry.shape).numel()
        return ", ".join(f"{policy}: {count:,}" for policy, count in counts.most_common())

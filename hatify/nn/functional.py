"""The operations that conversion inserts into a graph."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def masked(x: Tensor, mask: Tensor, dim: int | None) -> Tensor:
    """Equation 1's product: `x` with its features along `dim` (negative) multiplied by `mask`, shape (features,).

    With ``dim=None`` the mask has one entry for every element of `x`.
    """
    shape = x.shape if dim is None else (-1, *(1,) * (-1 - dim))
    return x * mask.to(x.dtype).view(shape)


def by_mode(training: bool, in_training: T, in_evaluation: T) -> T:
    """A constant that depends on whether the network is training."""
    return in_training if training else in_evaluation

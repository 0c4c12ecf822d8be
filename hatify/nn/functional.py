"""The operations that conversion inserts into a graph."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

T = TypeVar("T")


def view_along(mask: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`mask`, shape (features,), as it broadcasts along `dim`, negative; or in a shape, for several dimensions."""
    return mask.view((-1, *(1,) * (-1 - dim)) if isinstance(dim, int) else dim)


def masked(x: Tensor, mask: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Equation 1's product: `x` with its features multiplied by `mask`, which lies in it as `view_along` says."""
    return x * view_along(mask.to(x.dtype), dim)


class _MaskedOff(Function):
    @staticmethod
    def forward(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask == 0, 0.0, x * mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = ctx.saved_tensors
        grad = torch.where(mask == 0, 0.0, grad)
        return grad * mask, torch.where(mask == 0, 0.0, grad * x).sum_to_size(mask.shape)


def masked_off(x: Tensor, mask: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`masked`, but a feature that is off is zero whatever its value was, and nothing at all flows back through it.

    For outputs that are infinite, or meet a function which is infinitely steep, at zero: ∞ · 0 is not a number.
    """
    return _MaskedOff.apply(x, view_along(mask.to(x.dtype), dim))


def by_mode(training: bool, in_training: T, in_evaluation: T) -> T:
    """A constant that depends on whether the network is training."""
    return in_training if training else in_evaluation

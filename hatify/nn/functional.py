"""The operations that conversion inserts into a graph."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

T = TypeVar("T")


def masked(x: Tensor, mask: Tensor, dim: int | None) -> Tensor:
    """Equation 1's product: `x` with its features along `dim` (negative) multiplied by `mask`, shape (features,).

    With ``dim=None`` the mask has one entry for every element of `x`.
    """
    shape = x.shape if dim is None else (-1, *(1,) * (-1 - dim))
    return x * mask.to(x.dtype).view(shape)


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


def masked_off(x: Tensor, mask: Tensor, dim: int | None) -> Tensor:
    """`masked`, but a feature that is off is zero whatever its value was, and nothing at all flows back through it.

    For outputs that are infinite, or meet a function which is infinitely steep, at zero: ∞ · 0 is not a number.
    """
    shape = x.shape if dim is None else (-1, *(1,) * (-1 - dim))
    return _MaskedOff.apply(x, mask.to(x.dtype).view(shape))


def by_mode(training: bool, in_training: T, in_evaluation: T) -> T:
    """A constant that depends on whether the network is training."""
    return in_training if training else in_evaluation

"""The hard attention gate: Equations 1 and 3."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

#: Gate values up to this are set to zero: they are far under float32's resolution beside 1, and arithmetic on the
#: subnormal numbers a steep sigmoid produces is tens of times slower on a CPU.
FLOOR = 2.0**-24
#: Embeddings are kept within ± this after every optimizer step (Serrà et al. 2018, section 2.4): further out, the
#: compensated gradient s_max σ'(e) is too small to ever bring them back.
EMBEDDING_LIMIT = 6.0


class _Gate(Function):
    #: Per-sample gradients: `torch.func.vmap` over what is called with the gate.
    generate_vmap_rule = True

    @staticmethod
    def forward(embedding: Tensor, scale: Tensor, s_max: float, clamp: float | None) -> Tensor:
        return torch.threshold_(torch.sigmoid_(scale * embedding), FLOOR, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, float | None], output: Tensor) -> None:
        embedding, scale, ctx.s_max, ctx.clamp = inputs
        ctx.save_for_backward(embedding, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        embedding, scale = ctx.saved_tensors
        compensated = grad / torch.cosh(embedding).add_(1).mul_(2 / ctx.s_max)
        if ctx.clamp is not None:
            compensated = compensated * clamp_factor(scale * embedding, ctx.clamp)
        return compensated, None, None, None


def gate(embedding: Tensor, scale: Tensor, s_max: float, clamp: float | None = None) -> Tensor:
    """Equation 1, a = σ(s·e), with the compensated gradient of Equation 3.

    With q = g·s·σ'(s·e) and σ'(x) = 1 / (2 (cosh x + 1)), Equation 3 simplifies to q' = g·s_max·σ'(e), where g is the
    gradient with respect to a. That form neither overflows nor divides by zero, for any s.

    Args:
        embedding: e, any shape, floating point.
        scale: s, a scalar tensor, positive.
        s_max: the upper bound of s.
        clamp: reproduce the published implementation, which clamps |s·e| in Equation 3 at this value (50 there).

    Returns:
        The gate a in [0, 1], shape and dtype of `embedding`; values up to 2⁻²⁴ are exactly zero.
    """
    return _Gate.apply(embedding, scale.to(embedding.dtype), s_max, clamp)


def clamp_factor(scaled: Tensor, clamp: float) -> Tensor:
    """(cosh(min(|x|, clamp)) + 1) / (cosh(x) + 1) for x = s·e, without forming a large cosh."""
    half = scaled.abs() / 2
    return torch.exp(2 * (_log_cosh(half.clamp(max=clamp / 2)) - _log_cosh(half)))


def _log_cosh(x: Tensor) -> Tensor:
    """log cosh x for x ≥ 0; note that cosh(2x) + 1 = 2 cosh²x."""
    return x + torch.log1p(torch.exp(-2 * x)) - math.log(2.0)

"""Layer normalisation over active features.

With a mask a over C features, k = Σa, and an input x that is masked already, statistics are those of the active
features: m = Σx / k and v = Σ(x − a·m)² / k, and the result is a · (w (x − a·m) / √(v + ε) + b), a·m being what x has
where it equals the mean.

The native kernel knows nothing of masks. It is given x + (1 − a)·m: features that are off lie at the mean, so that the
kernel's mean is m and its variance is v·k/C; with ε·k/C for ε and √(k/C)·w for w it yields just the above.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from hatify.nn.folding import is_transformed, remembered


class Folded(NamedTuple):
    """What the kernel needs beside x: the tensors have shape (C,)."""

    active: float  #: k
    eps: float  #: ε·k/C
    fill: Tensor  #: 1 − a
    weight: Tensor  #: √(k/C)·a·w
    bias: Tensor | None  #: a·b


def share_of(mask: Tensor) -> float:
    """k/C, kept away from zero: without an active feature there is nothing to normalise."""
    return max(float(mask.sum()) / mask.numel(), torch.finfo(mask.dtype).eps)


def fold(mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Folded:
    """Multiply the mask into the parameters."""
    share = share_of(mask)
    weight = mask * share**0.5 if weight is None else weight * mask * share**0.5
    return Folded(share * mask.numel(), eps * share, 1 - mask, weight, None if bias is None else bias * mask)


def filled_in(x: Tensor, mean: Tensor, fill: Tensor) -> Tensor:
    """x + (1 − a)·m, contiguous, as the kernel wants it."""
    if isinstance(x, Tensor) and not x.is_contiguous():
        return x.contiguous().addcmul_(mean, fill)  # into the copy
    return torch.addcmul(x, mean, fill)


class _MaskedLayerNorm(Function):
    """The above with a gradient in one pass of the native kernel and a few products.

    A step takes no longer without it (benchmarks/fast_paths.py), but autograd would keep one activation more.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        folded = fold(mask, weight, bias, eps)
        mean = x.sum(-1, keepdim=True) / folded.active
        filled = filled_in(x, mean, folded.fill)
        normal = torch.native_layer_norm(filled, mask.shape, folded.weight, folded.bias, folded.eps)
        return normal[0], mean, *normal[1:], folded.fill, folded.weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, mask, weight, bias, mean, kernel_mean, rstd, fill, folded_weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a gradient of the gradient
            inputs = [t for t, needed in zip((x, mask, weight, bias), ctx.needs_input_grad, strict=False) if needed]
            again = torch.autograd.grad(composite(x, mask, weight, bias, ctx.eps), inputs, grad, create_graph=True)
            found = iter(again)
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None)
        with torch.autocast(x.device.type, enabled=False):
            share = share_of(mask)
            active, root = share * mask.numel(), share**0.5
            filled = filled_in(x, mean, fill)
            needed = [True, True, bias is not None]
            g, g_weight, g_bias = torch.ops.aten.native_layer_norm_backward(
                grad, filled, mask.shape, kernel_mean, rstd, folded_weight, bias, needed
            )
            rows, means = g.reshape(-1, mask.numel()), mean.reshape(-1)
            g_mean = torch.mv(rows, fill).div_(active)
            g_weight = g_weight.mul_(root)
            g_mask = g_weight if weight is None else g_weight * weight
            # k enters through the mean, through √(k/C), and through ε·k/C, for which Σ g ⊙ x̂ = −2 ε ∂/∂ε.
            g_count = torch.dot(g_mask, mask) / (2 * active) - torch.dot(g_mean, means)
            if ctx.eps:
                g_count -= torch.dot(rows.reshape(-1), filled.reshape(-1)) / (2 * active)
            g_mask = torch.addmv(g_mask, rows.T, means, alpha=-1).add_(g_count)
            if bias is not None:
                g_mask.addcmul_(g_bias, bias)
                g_bias = g_bias.mul_(mask)
            g_weight = None if weight is None else g_weight.mul_(mask)
            return g.add_(g_mean.view_as(mean)), g_mask, g_weight, None if bias is None else g_bias, None


def composite(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same in elementary operations: for compilers, other devices, derivatives of any order, several dimensions."""
    share = mask.mean().clamp_min(torch.finfo(mask.dtype).eps)
    mean = x.mean(tuple(range(-mask.ndim, 0)), keepdim=True) / share
    filled = torch.addcmul(x, mean, 1 - mask) * share.rsqrt()
    weight = mask * share.sqrt() if weight is None else weight * mask * share.sqrt()
    return F.layer_norm(filled, mask.shape, weight, None if bias is None else bias * mask, eps)


def masked_layer_norm(norm: Any, x: Tensor, mask: Tensor) -> Tensor:
    """`norm`, a layer norm, over the active features.

    Args:
        norm: has ``weight`` and ``bias``, of the normalised shape or None, and ``eps``.
        x: shape (…, *normalised shape), zero where the mask is.
        mask: of the normalised shape, in [0, 1], in the dtype of `x`.
    """
    weight, bias = (None if p is None else p.to(mask.dtype) for p in (norm.weight, getattr(norm, "bias", None)))
    if is_transformed() or mask.device.type != "cpu" or mask.ndim > 1:
        return composite(x, mask, weight, bias, norm.eps)
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        y: Tensor = _MaskedLayerNorm.apply(x, mask, weight, bias, norm.eps)[0]
        return y
    folded = remembered(norm, mask, lambda: fold(mask, weight, bias, norm.eps))
    filled = filled_in(x, x.sum(-1, keepdim=True) / folded.active, folded.fill)
    return F.layer_norm(filled, mask.shape, folded.weight, folded.bias, folded.eps)

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
from torch.nn import functional as F

from hatify.nn.folding import is_transformed, remembered


class Folded(NamedTuple):
    """What the kernel needs beside x: the tensors have shape (C,)."""

    active: float  #: k
    eps: float  #: ε·k/C
    fill: Tensor  #: 1 − a
    weight: Tensor  #: √(k/C)·a·w
    bias: Tensor | None  #: a·b


def fold(mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Folded:
    """Multiply the mask into the parameters."""
    # Kept away from zero: without an active feature there is nothing to normalise.
    share = max(float(mask.sum()) / mask.numel(), torch.finfo(mask.dtype).eps)
    weight = mask * share**0.5 if weight is None else weight * mask * share**0.5
    return Folded(share * mask.numel(), eps * share, 1 - mask, weight, None if bias is None else bias * mask)


def filled_in(x: Tensor, mean: Tensor, fill: Tensor) -> Tensor:
    """x + (1 − a)·m, contiguous, as the kernel wants it."""
    if isinstance(x, Tensor) and not x.is_contiguous():
        return x.contiguous().addcmul_(mean, fill)  # into the copy
    return torch.addcmul(x, mean, fill)


def composite(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same without a number that depends on the mask: for masks that learn, compilers, and other devices."""
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
    if mask.requires_grad or mask.device.type != "cpu" or mask.ndim > 1 or is_transformed():
        return composite(x, mask, weight, bias, norm.eps)
    folded = remembered(norm, mask, lambda: fold(mask, weight, bias, norm.eps))
    filled = filled_in(x, x.sum(-1, keepdim=True) / folded.active, folded.fill)
    return F.layer_norm(filled, mask.shape, folded.weight, folded.bias, folded.eps)

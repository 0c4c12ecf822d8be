"""Normalisation over masked features.

A normalisation of a task sees the task's active features only: statistics that mix features are weighted by the mask,
and features that are off come out as zero. With every feature on, each function below is the ordinary normalisation.

Statistics over k = Σa of C features are computed by the native kernels, which know nothing of masks: the features
that are off are filled with the mean over the active ones, so that the kernel's mean is that mean and its variance is
k/C of theirs; scaling the input by √(C/k) and the weight by √(k/C) makes up for that, eps included.

Features of a locked base are normalised by statistics of the base alone, and so are those beside it: else what a task
adds would change the base.

To add a normalisation, write a function of (norm, input, mask) and register it with its types.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hatify.nn.folding import remembered
from hatify.nn.layer_norm import masked_layer_norm

_APART = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
MaskedNorm = Callable[..., Tensor]

#: The masked form of each normalisation type.
NORMS: dict[type[nn.Module], MaskedNorm] = {}
#: Dimensions of the input that a type's features may lie along, given (norm, number of dimensions of the input).
FEATURE_DIMS: dict[type[nn.Module], Callable[[Any, int], range]] = {}
#: timm's normalisations, by the torch type they are computed like; registered once timm is in use.
TIMM_NORMS = {
    nn.BatchNorm2d: ("BatchNormAct2d",),
    nn.LayerNorm: ("LayerNorm", "LayerNormFp32", "LayerNormAct", "LayerNormActFp32"),
    nn.GroupNorm: ("GroupNorm", "GroupNorm1", "GroupNormAct", "GroupNorm1Act"),
    nn.RMSNorm: ("RmsNorm", "RmsNormFp32", "RmsNormAct", "RmsNormActFp32"),
}
TIMM_CHANNELS_FIRST = {
    nn.LayerNorm: (
        "LayerNorm2d",
        "LayerNorm2dFp32",
        "LayerNormExp2d",
        "LayerNormAct2d",
        "LayerNormAct2dFp32",
    ),
    nn.RMSNorm: ("RmsNorm2d", "RmsNorm2dFp32", "RmsNormAct2d", "RmsNormAct2dFp32"),
}


def normalises(*types: type[nn.Module], dims: Callable[[Any, int], range]) -> Callable[[MaskedNorm], MaskedNorm]:
    """Register a function as the masked form of some types; `dims` says along which dimensions features may lie."""

    def register(function: MaskedNorm) -> MaskedNorm:
        for kind in types:
            NORMS[kind], FEATURE_DIMS[kind] = function, dims
        return function

    return register


def channel(norm: Any, ndim: int) -> range:
    """Features lie along dimension 1."""
    return range(1, 2)


def trailing(norm: Any, ndim: int) -> range:
    """Features lie along the normalised dimensions, which come last."""
    return range(ndim - len(norm.normalized_shape), ndim)


@normalises(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, dims=channel)
def batch_norm(norm: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Each feature has statistics of its own, so the mask goes into the affine part."""
    momentum = norm.momentum or 0.0
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    weight, bias = remembered(norm, mask, lambda: _masked_affine(norm, mask.to(_dtype(norm, x))))
    tracked = not norm.training or norm.track_running_stats
    y = F.batch_norm(
        x,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        weight,
        bias,
        norm.training or norm.running_mean is None,
        momentum,
        norm.eps,
    )
    return _activated(norm, y)


@normalises(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, dims=channel)
def instance_norm(norm: Any, x: Tensor, mask: Tensor) -> Tensor:
    """As batch norm, with statistics per sample."""
    weight, bias = _masked_affine(norm, mask.to(_dtype(norm, x)))
    own_statistics = norm.training or not norm.track_running_stats
    return F.instance_norm(
        x, norm.running_mean, norm.running_var, weight, bias, own_statistics, norm.momentum or 0.0, norm.eps
    )


@normalises(nn.LayerNorm, dims=trailing)
def layer_norm(norm: Any, x: Tensor, mask: Tensor, over: Tensor | None = None) -> Tensor:
    """Mean and variance over the active features of the normalised dimensions; or `over` others."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    a = mask.to(wide.dtype)
    if over is not None:
        return _activated(norm, _normalised_over(norm, wide, a, over, (-1,)).to(x.dtype))
    if len(norm.normalized_shape) > 1:
        a = a.view(_mask_view(norm.normalized_shape, mask)).expand(norm.normalized_shape)
    return _activated(norm, masked_layer_norm(norm, wide, a).to(x.dtype))


@normalises(nn.RMSNorm, dims=trailing)
def rms_norm(norm: Any, x: Tensor, mask: Tensor, over: Tensor | None = None) -> Tensor:
    """Root mean square over the active features; the others are zero already and only the count changes."""
    shape = norm.normalized_shape
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if over is not None:
        y = _normalised_over(norm, wide, mask.to(wide.dtype), over, (-1,), centred=False)
        return _activated(norm, y.to(x.dtype))
    a = mask.to(wide.dtype).view(_mask_view(shape, mask))
    share = _share(a.mean())
    weight, _ = _masked_affine(norm, a.expand(shape))
    y = F.rms_norm(wide * share.rsqrt(), shape, weight.to(wide.dtype) * share.sqrt(), norm.eps)
    return _activated(norm, y.to(x.dtype))


@normalises(nn.GroupNorm, dims=channel)
def group_norm(norm: Any, x: Tensor, mask: Tensor, over: Tensor | None = None) -> Tensor:
    """Mean and variance over the active channels of each group; or, of a single group, `over` others."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    groups = norm.num_groups
    a = mask.to(wide.dtype)
    if over is not None:
        return _activated(norm, _normalised_over(norm, wide, a, over, tuple(range(1, x.ndim))).to(x.dtype))
    share = _share(a.view(groups, -1).mean(1))
    per_channel = share.repeat_interleave(a.numel() // groups)
    mean = wide.reshape(wide.shape[0], groups, -1).mean(2) / share
    spread = (-1, *(1,) * (wide.ndim - 2))
    mean = mean.repeat_interleave(a.numel() // groups, 1).view(wide.shape[0], *spread)
    filled = torch.addcmul(wide, mean, (1 - a).view(spread)) * per_channel.rsqrt().view(spread)
    weight, bias = _masked_affine(norm, a)
    y = F.group_norm(filled, groups, weight.to(wide.dtype) * per_channel.sqrt(), _cast(bias, wide.dtype), norm.eps)
    return _activated(norm, y.to(x.dtype))


def _normalised_over(
    norm: Any, x: Tensor, mask: Tensor, over: Tensor, dims: tuple[int, ...], centred: bool = True
) -> Tensor:
    """`x` without its mean and divided by its deviation, of the features `over` along the first of `dims`.

    `over`: bool, shape (features,). `mask`, shape (features,), goes into the affine part.
    """
    spread = (-1, *(1,) * (len(dims) - 1))
    counted = over.to(mask.dtype).view(spread)
    share = over.sum() / over.numel()
    if centred:
        x = x - (x * counted).mean(dims, keepdim=True) / share
    eps = torch.finfo(mask.dtype).eps if norm.eps is None else norm.eps  # as torch's RMSNorm has it
    y = x * ((x.square() * counted).mean(dims, keepdim=True) / share + eps).rsqrt()
    weight, bias = _masked_affine(norm, mask)
    y = y * weight.to(mask.dtype).view(spread)
    return y if bias is None else y + bias.to(mask.dtype).view(spread)


def mixes_features(norm: nn.Module) -> bool:
    """Whether features, along one dimension, are normalised by statistics of others, in one group."""
    single = len(getattr(norm, "normalized_shape", (0,))) == 1
    return single and not keeps_features_apart(norm) and getattr(norm, "num_groups", 1) == 1


def channels_first(function: MaskedNorm) -> MaskedNorm:
    """The same normalisation over dimension 1 of images, (N, C, H, W)."""

    def over_channels(norm: Any, x: Tensor, mask: Tensor, over: Tensor | None = None) -> Tensor:
        return function(norm, x.permute(0, 2, 3, 1), mask, over).permute(0, 3, 1, 2)

    return over_channels


def register_timm() -> None:
    """Register timm's normalisations, fused activations included, if timm is in use."""
    layers = sys.modules.get("timm.layers")
    if layers is None:
        return
    for base, names in TIMM_NORMS.items():
        for kind in (getattr(layers, name, None) for name in names):
            if kind is not None:
                normalises(kind, dims=FEATURE_DIMS[base])(NORMS[base])
    for base, names in TIMM_CHANNELS_FIRST.items():
        for kind in (getattr(layers, name, None) for name in names):
            if kind is not None:
                normalises(kind, dims=channel)(channels_first(NORMS[base]))


#: The type for inputs of three dimensions or fewer, for four, and for five.
_OF_DIMENSIONS: dict[type[nn.Module], tuple[Any, ...]] = {
    kinds[0]: kinds
    for kinds in (
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    )
}


class AsModule:
    """What a function is given for a normalisation, under the names that the module has for it.

    Args:
        kind: the type of the module, by its name in `torch.nn`.
        given: the function's arguments by name, where they were given.
    """

    def __init__(self, kind: str, given: dict[str, Any]) -> None:
        self.kind: type[nn.Module] = getattr(nn, kind)
        instance = issubclass(self.kind, nn.modules.instancenorm._InstanceNorm)
        self.training: bool = given.get("use_input_stats", True) if instance else given.get("training", False)
        self.eps: Any = given.get("eps", None if self.kind is nn.RMSNorm else 1e-5)
        self.momentum = given.get("momentum", 0.1)
        self.weight, self.bias = given.get("weight"), given.get("bias")
        self.running_mean, self.running_var = given.get("running_mean"), given.get("running_var")
        self.normalized_shape, self.num_groups = tuple(given.get("normalized_shape", ())), given.get("num_groups")
        self.track_running_stats, self.num_batches_tracked = True, None
        self._parameters: dict[str, Any] = {}
        self._modules: dict[str, Any] = {}

    def module(self, x: Tensor) -> nn.Module | None:
        """The module that does the same with `x` in evaluation mode; None where there is none."""
        kind: Any = self.kind
        tracked = self.running_mean is not None
        result: Any
        if issubclass(kind, _APART):
            if tracked and self.training:
                return None  # moves running statistics
            result = _OF_DIMENSIONS[kind][max(0, x.ndim - 3)](
                x.shape[1], self.eps, self.momentum, self.weight is not None, tracked
            )
        elif self.num_groups is not None:
            result = nn.GroupNorm(self.num_groups, x.shape[1], self.eps)
        else:
            result = kind(self.normalized_shape, self.eps)
        for name in ("weight", "bias"):
            if name in result._parameters:
                value = getattr(self, name)
                held = value is None or isinstance(value, nn.Parameter)
                result._parameters[name] = value if held else nn.Parameter(value, False)
        if tracked:
            result.running_mean, result.running_var = self.running_mean, self.running_var
        return result.eval()


def masked_norm(x: Tensor, kind: str, mask: Tensor, **given: Any) -> Tensor:
    """A normalisation written as a function, over the active features: what the module does with the same mask."""
    norm = AsModule(kind, given)
    return NORMS[norm.kind](norm, x, mask)


def feature_dims(norm: Any, ndim: int) -> range:
    """The dimensions of an input with `ndim` dimensions that the features of `norm` may lie along."""
    return FEATURE_DIMS[norm.kind if isinstance(norm, AsModule) else type(norm)](norm, ndim)


def takes_inside(norm: Any, dim: int | tuple[int, ...], ndim: int) -> bool:
    """Whether the masked dimension is one that the normalisation treats as features."""
    if dim not in feature_dims(norm, ndim):
        return False
    shape = getattr(norm, "normalized_shape", (0,))
    return len(shape) <= 1 or len(set(shape)) == len(shape)


def is_known(norm: nn.Module) -> bool:
    """Whether `norm` has a masked form; a subclass has one if it computes what its base does."""
    register_timm()
    kind = type(norm)
    if kind not in NORMS:
        base = next((b for b in kind.__mro__ if b in NORMS), None)
        if base is None or kind.forward is not base.forward or hasattr(norm, "parametrizations"):
            return False
        NORMS[kind], FEATURE_DIMS[kind] = NORMS[base], FEATURE_DIMS[base]
    return True


def keeps_features_apart(norm: nn.Module) -> bool:
    """Whether each feature is normalised by statistics of its own."""
    return isinstance(norm, _APART)


def is_torchs(norm: nn.Module) -> bool:
    """Whether `norm` is of one of torch's own types."""
    return getattr(nn, type(norm).__name__, None) is type(norm)


def zero_at_zero(norm: Any) -> bool:
    """Whether a fused activation keeps zero; otherwise the output needs a mask of its own."""
    act = getattr(norm, "act", None)
    return act is None or not bool(act(torch.zeros(1)).any())


def _share(share: Tensor) -> Tensor:
    """k / C, kept away from zero: with no active feature there is nothing to normalise."""
    return share.clamp_min(torch.finfo(share.dtype).eps)


def _mask_view(shape: tuple[int, ...], mask: Tensor) -> tuple[int, ...]:
    """The view in which a feature mask broadcasts against the normalised dimensions."""
    dim = shape.index(mask.numel())
    return (mask.numel(), *(1,) * (len(shape) - 1 - dim))


def _masked_affine(norm: Any, a: Tensor) -> tuple[Tensor, Tensor | None]:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return a if weight is None else weight * a, None if bias is None else bias * a


def _activated(norm: Any, y: Tensor) -> Tensor:
    for name in ("drop", "act"):
        stage = norm._modules.get(name)
        y = y if stage is None else stage(y)
    return y


def _dtype(norm: Any, x: Tensor) -> torch.dtype:
    weight = getattr(norm, "weight", None)
    return x.dtype if weight is None else weight.dtype


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)

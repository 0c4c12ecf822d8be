"""Pooling, resampling, and reductions over dimensions."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hatify.labels import ON, ZERO, compact, is_leaf, varying_dims
from hatify.rules.registry import Call, Labels, rule


@rule(
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.lp_pool1d, F.lp_pool2d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, torch.avg_pool1d, torch.adaptive_avg_pool1d,
    torch._C._nn.avg_pool2d, torch._C._nn.avg_pool3d, F.interpolate, F.upsample,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
def spatial(call: Call) -> Labels:
    """Pooling and resampling work within a channel.

    A mask behind them keeps positions that are ON (a border padded with −∞, say) from filling features that are off.
    """
    labels = call.label(0)
    if not isinstance(call.out, Tensor):
        return call.all_on()
    named = re.search(r"([123])d$", type(call.module).__name__ if call.module is not None else _name(call))
    positions = int(named[1]) if named and "pool" in named.string.lower() else labels.ndim - 2
    dims = range(labels.ndim - positions, labels.ndim)
    merged = call.space.merge(labels, dims).expand(call.out.shape)
    if not (compact(merged) == ON).any():
        return merged
    features = call.space.merge(torch.where(compact(labels) == ON, ZERO, compact(labels)), dims).expand(call.out.shape)
    filled = (compact(merged) == ON) & is_leaf(compact(features))
    return call.mask(torch.where(filled, features, merged)) if filled.any() else merged


@rule(
    torch.mean, torch.sum, torch.amax, torch.amin, torch.max, torch.min, torch.std, torch.var, torch.norm,
    torch.logsumexp, torch.linalg.vector_norm, torch.var_mean, torch.std_mean, torch.median,
    "mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "median",
)  # fmt: skip
def reduce(call: Call) -> Labels:
    """Over positions, the feature's label; over features, ON.

    Where features differ between the positions reduced over (class token and patches, groups that are summed), they
    are coupled, unless the dimension is kept: that is how statistics for a normalisation are taken.
    """
    if isinstance(call.argument(1, "other"), Tensor):
        return call.all_on()  # elementwise max or min of two tensors
    labels = call.label(0)
    place = 2 if "norm" in _name(call) else 1  # after the order of the norm
    dims = _dims(call.argument(place, "dim"), labels.ndim)
    keepdim = bool(call.argument(place + 1, "keepdim", False))
    varying = set(varying_dims(labels))
    if _name(call) in ("logsumexp",) or (varying & dims and (keepdim or not varying - dims)):
        return call.all_on()
    merged = call.space.merge(labels, dims)
    if not keepdim:
        merged = merged[tuple(0 if d in dims else slice(None) for d in range(labels.ndim))]
    return _like_output(call, merged)


def _like_output(call: Call, labels: Tensor) -> Labels:
    """Reductions such as ``max`` return (values, indices)."""
    if isinstance(call.out, Tensor):
        return labels if labels.shape == call.out.shape else call.all_on()
    return tuple(labels if o.is_floating_point() else call.all_on(o) for o in call.out)


@rule(torch.cumsum, "cumsum", torch.softmax, F.softmax, F.log_softmax, nn.Softmax, nn.LogSoftmax, "softmax")
def mixing(call: Call) -> Labels:
    """Every output along the dimension depends on every input; features along a later dimension stay where they are.

    If all lie along earlier ones they are attention weights' heads, which are not what the values they weigh depend on.
    """
    labels, dim = call.label(0), call.argument(1, "dim", getattr(call.module, "dim", None))
    if not isinstance(dim, int) or labels.shape != call.out.shape:
        return call.all_on()
    dim, varying = dim % labels.ndim, varying_dims(labels)
    if dim in varying:
        return call.all_on()
    if varying and max(varying) < dim:
        call.findings.weighing.append(labels)
        return call.all_on()
    return call.mask(labels)


def _dims(dim: int | Sequence[int] | None, ndim: int) -> set[int]:
    if dim is None:
        return set(range(ndim))
    return {d % ndim for d in ([dim] if isinstance(dim, int) else dim)}


def _name(call: Call) -> str:
    return str(getattr(call.node.target, "__name__", call.node.target))


#: Features that a layer reads in one place, for each place, from which on it is taken to mix positions. Coupling makes
#: one mask of them; reading them as ON only locks the few weights of that layer more often.
MANY = 4


def read_along(call: Call, labels: Tensor, dim: int) -> Tensor:
    """What a layer that contracts `dim` reads: one label per input feature, shape (I,).

    Different features at different positions of one input feature are coupled. Where that would leave few of many
    apart, because the labels vary more elsewhere than along `dim`, the layer mixes positions, and each position is ON.
    """
    dim %= labels.ndim
    if set(varying_dims(labels)) - {dim} and is_leaf(compact(labels)).any() and _lie_across(compact(labels), dim):
        return torch.tensor(ON).expand(labels.shape[dim])
    merged = call.space.merge(labels, [d for d in range(labels.ndim) if d != dim])
    return merged[tuple(slice(None) if d == dim else 0 for d in range(labels.ndim))]


def _lie_across(labels: Tensor, dim: int) -> bool:
    """Whether labels vary elsewhere, and not along `dim` or many times less."""
    lines = labels.movedim(dim, -1).reshape(-1, labels.shape[dim])
    along = _most_different(lines)
    return along == 1 or _most_different(lines.T) > MANY * along


def _most_different(rows: Tensor, sample: int = 64) -> int:
    """The highest number of different values in a row, of up to about `sample` rows."""
    rows = rows[:: max(1, len(rows) // sample)]
    return int((rows.sort(1).values.diff(dim=1) != 0).sum(1).max()) + 1

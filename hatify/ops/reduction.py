"""Pooling, resampling, and reductions over dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from hatify.axes import Axes, Names
from hatify.labels import ON, ZERO, is_leaf, unexpanded, varying_dims
from hatify.ops.registry import Call, Cut, Labels, Rule, Trait, aligned, alike, op

# Within a channel ----------------------------------------------------------------------------------------------------


def _spatial(positions: int | None) -> Rule:
    """Labels of pooling over the last `positions` dimensions, or of resampling all behind the channels (None)."""

    def spatial(call: Call) -> Labels:
        if not isinstance(call.out, Tensor):
            return call.all_on()
        labels = call.label(0)
        dims = range(labels.ndim - (labels.ndim - 2 if positions is None else positions), labels.ndim)
        merged = call.space.merge(labels, dims).expand(call.out.shape)
        if not (unexpanded(merged) == ON).any():
            return merged
        # Positions that are ON (a border padded with −∞, say) must not fill features that are off.
        features = call.space.merge(torch.where(unexpanded(labels) == ON, ZERO, unexpanded(labels)), dims)
        features = features.expand(call.out.shape)
        filled = (unexpanded(merged) == ON) & is_leaf(unexpanded(features))
        return call.mask(torch.where(filled, features, merged)) if filled.any() else merged

    return spatial


def _within_channels(positions: int | None) -> Cut:
    """Pooling and resampling need every position."""

    def cut(call: Call) -> Axes | None:
        x: Tensor = call.argument(0, "input")
        behind = x.ndim - 2 if positions is None else positions
        lead, own = tuple(range(x.ndim - behind)), tuple(f"x{d}" for d in range(behind))
        made = [t for t in tree_leaves(call.out) if isinstance(t, Tensor)]
        outs: list[Names] = [(*lead, *(f"y{d}" for d in range(behind))) for _ in made]
        return call.axes(
            [(call.given(0, "input"), (*lead, *own))], *outs, whole=(*own, *(f"y{d}" for d in range(behind)))
        )

    return cut


def _pooling(positions: int | None, *targets: Any, traits: Iterable[Trait] = ()) -> None:
    op(*targets, traits={Trait.STATISTIC, *traits}, cut=_within_channels(positions))(_spatial(positions))


_pooling(
    1, F.max_pool1d, F.avg_pool1d, F.lp_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d, torch.max_pool1d,
    nn.MaxPool1d, nn.AvgPool1d, nn.LPPool1d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
)  # fmt: skip
_pooling(
    2, F.max_pool2d, F.lp_pool2d, F.adaptive_max_pool2d, torch.max_pool2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_pooling(2, F.avg_pool2d, F.adaptive_avg_pool2d, traits={Trait.AFTER_HEADS})
_pooling(
    3, F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d, torch.max_pool3d,
    nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_pooling(None, F.upsample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
_pooling(None, F.interpolate, traits={Trait.AFTER_HEADS})


# Over dimensions -----------------------------------------------------------------------------------------------------


def _reduction(place: int) -> Rule:
    """Labels of a reduction whose argument at `place` says over which dimensions.

    Over positions, the feature's label; over features, ON. Where features differ between the positions reduced over
    (class token and patches, groups that are summed), they are coupled, unless the dimension is kept: that is how
    statistics for a normalisation are taken.
    """

    def reduce(call: Call) -> Labels:
        if isinstance(call.argument(1, "other"), Tensor):
            return call.all_on()  # elementwise max or min of two tensors
        labels = call.label(0)
        dims = _dims(call.argument(place, "dim"), labels.ndim)
        keepdim = bool(call.argument(place + 1, "keepdim", False))
        varying = set(varying_dims(labels))
        if varying & dims and (keepdim or not varying - dims):
            return call.all_on()
        merged = call.space.merge(labels, dims)
        if not keepdim:
            merged = merged[tuple(0 if d in dims else slice(None) for d in range(labels.ndim))]
        return _like_output(call, merged)

    return reduce


def _reduced(place: int) -> Cut:
    """What is reduced over is needed in full."""

    def cut(call: Call) -> Axes | None:
        if isinstance(call.argument(1, "other"), Tensor):
            return alike(call)
        x: Tensor = call.argument(0, "input")
        reduced = _dims(call.argument(place, "dim"), x.ndim)
        left: Names = tuple(d for d in range(x.ndim) if d not in reduced)
        made = [t for t in tree_leaves(call.out) if isinstance(t, Tensor)]
        outs = [left if t.ndim == len(left) else tuple(range(x.ndim)) for t in made]
        return call.axes([(call.given(0, "input"), tuple(range(x.ndim)))], *outs, filled=reduced)

    return cut


def _reducing(*targets: Any, place: int = 1, traits: Iterable[Trait] = ()) -> None:
    op(*targets, traits={Trait.STATISTIC, *traits}, cut=_reduced(place))(_reduction(place))


_reducing(
    torch.mean, torch.sum, torch.amax, torch.max, "mean", "sum", "amax", "max",
    traits={Trait.AFTER_HEADS},
)  # fmt: skip
_reducing(
    torch.amin, torch.min, torch.std, torch.var, torch.var_mean, torch.std_mean, torch.median,
    "amin", "min", "std", "var", "median",
)  # fmt: skip
_reducing(torch.norm, torch.linalg.vector_norm, "norm", place=2)  # after the order of the norm


@op(torch.logsumexp, traits={Trait.STATISTIC}, cut=_reduced(1))
def logsumexp(call: Call) -> Labels:
    """The logarithm of as many ones where all are off."""
    return call.all_on()


def _like_output(call: Call, labels: Tensor) -> Labels:
    """Reductions such as ``max`` return (values, indices)."""
    if isinstance(call.out, Tensor):
        return labels if labels.shape == call.out.shape else call.all_on()
    return tuple(labels if o.is_floating_point() else call.all_on(o) for o in call.out)


def mixed(call: Call) -> Axes | None:
    """What is mixed is needed in full."""
    dim = call.argument(1, "dim", getattr(call.module, "dim", None))
    if not isinstance(dim, int) or not isinstance(call.out, Tensor):
        return None
    names = aligned(call.out)
    return call.axes([(call.given(0, "input"), names)], names, filled=(dim % call.out.ndim - call.out.ndim,))


@op(
    torch.softmax, torch.log_softmax, F.softmax, F.log_softmax, "softmax", "log_softmax",
    traits={Trait.STATISTIC, Trait.AFTER_HEADS}, cut=mixed,
)  # fmt: skip
@op(torch.cumsum, nn.Softmax, nn.LogSoftmax, "cumsum", traits={Trait.STATISTIC}, cut=mixed)
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


#: Features that a layer reads in one place, for each place, from which on it is taken to mix positions. Coupling makes
#: one mask of them; reading them as ON only locks the few weights of that layer more often.
MANY = 4


def read_along(call: Call, labels: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What a layer that contracts `dims` reads: one label per input feature, shape (I,).

    Different features at different positions of one input feature are coupled. Where that would leave few of many
    apart, because the labels vary more elsewhere than along `dim`, the layer mixes positions, and each position is ON.
    """
    if len(dims) > 1:
        labels = labels.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
        dims = (-1,)
    dim = dims[0] % labels.ndim
    if set(varying_dims(labels)) - {dim} and is_leaf(unexpanded(labels)).any() and _lie_across(unexpanded(labels), dim):
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

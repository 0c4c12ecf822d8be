"""Products that sum over a dimension: matrix products, attention, einsum, and layers written as functions."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hatify.answers import asks
from hatify.axes import Dims
from hatify.labels import ON, ZERO, is_leaf, unexpanded, varying_dims
from hatify.ops import resize
from hatify.ops.reduction import read_along
from hatify.ops.registry import Call, Labels, Trait, has_trait, op, sources

if TYPE_CHECKING:
    from hatify.removal import Removal

#: Names for the dimensions of a batch.
LETTERS = "abcdefghijkl"


def product(removal: Removal, call: Call) -> bool:
    """(… M K) @ (… K N)."""
    a, b = call.given(0, "input"), call.given(1, "mat2" if call.given(1, "other") is None else "other")
    ndims = [len(removal.dims(n)) for n in (a, b)]
    if min(ndims) < 2:
        return False
    batch = LETTERS[: max(ndims) - 2]
    first, second = (batch[max(ndims) - n :] for n in ndims)
    return removal.contraction([(a, first + "XY"), (b, second + "YZ")], batch + "XZ", call)


@op(torch.matmul, torch.bmm, torch.mm, operator.matmul, "matmul", "bmm", "mm", "__matmul__", cut=product)
def matmul(call: Call) -> Labels:
    """(… M K) @ (… K N): a column is non-zero only where the second operand's column is, a row only where the
    first's row is. Features contracted with each other (queries and keys) are coupled.

    Of the two bounds, the one that tells more features apart is kept; the other is remembered, for linear attention,
    q (kᵀ v), contracts q with it."""
    second = "other" if call.given(1, "mat2") is None else "mat2"
    a, b = call.label(0), call.label(1, second)
    if a.ndim < 2 or b.ndim < 2:
        return call.all_on()
    return _product(call, a, b, call.given(0, "input"), call.given(1, second))


def _product(call: Call, a: Tensor, b: Tensor, *operands: fx.Node) -> Tensor:
    """Labels of ``a @ b``, both at least two-dimensional."""
    across_a, across_b = (call.findings.across.get(node) for node in operands) if operands else (None, None)
    contracted_a, contracted_b = (a.ndim - 1) in varying_dims(a), (b.ndim - 2) in varying_dims(b)
    queries, keys = a if contracted_a else across_a, b if contracted_b else across_b
    if queries is not None and keys is not None:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        queries = call.space.merge(queries, [-2]).expand(*batch, 1, a.shape[-1])
        keys = call.space.merge(keys, [-1]).transpose(-1, -2).expand(*batch, 1, b.shape[-2])
        call.space.meet(queries, keys)
    shape = call.out.shape
    rows = torch.tensor(ON) if contracted_a else a[..., :1]
    columns = _agreed(unexpanded(b)) if contracted_b else b[..., :1, :]
    kept, other = (rows, columns) if _width(rows) > _width(columns) else (columns, rows)
    call.findings.weighing.append(torch.where(is_leaf(kept), other, ON))
    if is_leaf(kept).any() and is_leaf(other).any():
        call.findings.across[call.node] = other.expand(shape)
    return torch.where(kept == ON, other, kept).expand(shape)


def _width(labels: Tensor) -> int:
    """How many different features there are."""
    return int(is_leaf(unexpanded(labels).unique()).sum())


def _agreed(b: Tensor) -> Tensor:
    """The label that every row of a column has, but for those that are ZERO; ON where they differ."""
    highest = b.amax(-2, keepdim=True)
    lowest = b.masked_fill(b == ZERO, torch.iinfo(b.dtype).max).amin(-2, keepdim=True)
    return torch.where((highest == lowest) | (b == ZERO).all(-2, keepdim=True), highest, ON)


@op(F.fold, nn.Fold)
def patches_summed(call: Call) -> Labels:
    """Overlapping patches of a channel are summed: (B, C · k², L) to (B, C, H, W)."""
    labels: Tensor = call.label(0)
    patches = labels.reshape(*call.out.shape[:-2], -1, labels.shape[-1])
    return call.space.merge(patches, (-2, -1)).expand(call.out.shape)


def attended(removal: Removal, call: Call) -> bool:
    """softmax(q kᵀ + mask) v: every key is needed."""
    q, k, v, mask = (call.given(i, name) for i, name in enumerate(("query", "key", "value", "attn_mask")))
    ndims = {len(removal.dims(n)) for n in (q, k, v)}
    if call.kwargs.get("enable_gqa") or len(ndims) > 1:
        return False
    batch = LETTERS[: ndims.pop() - 2]
    removal.dims(k)[-2].keep()
    if isinstance(mask, fx.Node):
        removal.elementwise([removal.dims(mask), Dims([*removal.dims(q)[:-1], removal.dims(k)[-2]])])
    return removal.contraction([(q, batch + "XY"), (k, batch + "JY")], batch + "XZ", call) and removal.contraction(
        [(v, batch + "JZ")], batch + "XZ", call
    )


@op(F.scaled_dot_product_attention, cut=attended, resize=resize.scaled_as_before)
def attention(call: Call) -> Labels:
    """softmax(q kᵀ) v: an output feature is non-zero only where that feature of v is; q and k are coupled."""
    q, k, v = (call.label(i, name) for i, name in enumerate(("query", "key", "value")))
    if call.kwargs.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    call.space.meet(call.space.merge(q, [-2]), call.space.merge(k, [-2]))
    if (v.ndim - 2) in varying_dims(v):
        v = call.space.merge(v, [-2])
    return v[..., :1, :].expand(call.out.shape)


def by_equation(removal: Removal, call: Call) -> bool:
    """One letter for each axis."""
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return False
    inputs, out = equation.replace(" ", "").split("->")
    return removal.contraction(list(zip(operands, inputs.split(","), strict=True)), out, call)


@op(torch.einsum, cut=by_equation)
def einsum(call: Call) -> Labels:
    """Two operands: as `matmul`; an output is non-zero only where the operand that holds its index may be."""
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation or len(operands) != 2:
        return call.all_on()
    inputs, output = equation.replace(" ", "").split("->")
    labels = [call.labels_of(operand) for operand in operands]
    result = torch.tensor(ON)
    for names, label in zip(inputs.split(","), labels, strict=True):
        varying = {names[d] for d in varying_dims(label)}
        if varying <= set(output):
            kept = label[tuple(slice(None) if n in output else 0 for n in names)]
            order = sorted((n for n in names if n in output), key=output.index)
            kept = kept.permute([[n for n in names if n in output].index(n) for n in order])
            shape = [kept.shape[order.index(n)] if n in order else 1 for n in output]
            result = torch.where(result == ON, unexpanded(kept.reshape(shape)), result)
    contracted = [n for n in inputs.split(",")[0] if n in inputs.split(",")[1] and n not in output]
    if len(contracted) == 1:
        _meet_along(call, inputs.split(","), labels, contracted[0])
    return result.expand(call.out.shape)


def _meet_along(call: Call, names: list[str], labels: list[Tensor], contracted: str) -> None:
    """Couple the features of two operands along the index they are contracted over, where both vary along it."""
    shared = [n for n in names[0] if n in names[1]]
    aligned = []
    for own, label in zip(names, labels, strict=True):
        if own.index(contracted) not in varying_dims(label):
            return
        merged = call.space.merge(label, [d for d, n in enumerate(own) if n not in shared])
        merged = merged[tuple(slice(None) if n in shared else 0 for n in own)]
        own_shared = [n for n in own if n in shared]
        aligned.append(merged.permute([own_shared.index(n) for n in shared]))
    call.space.meet(*aligned)


# Layers written as functions -----------------------------------------------------------------------------------------


def weight_of(layer: fx.Node) -> Any:
    """The weight that is given to a layer written as a function."""
    return layer.args[1] if len(layer.args) > 1 else layer.kwargs.get("weight")


def groups_of(layer: fx.Node) -> Any:
    """The number of groups of a layer written as a function."""
    return layer.args[6] if len(layer.args) > 6 else layer.kwargs.get("groups", 1)


def is_only_a_weight(parameter: fx.Node) -> bool:
    """Whether nothing but layers written as functions reads a parameter here: its entries need no labels."""
    return all(
        asks(user) or (has_trait(user, Trait.WEIGHTED) and weight_of(user) is parameter and groups_of(user) == 1)
        for user in parameter.users
    )


def layer_like(removal: Removal, call: Call) -> bool:
    """As a layer: the weight's rows go with the output's features, its columns with the input's."""
    x, weight, bias = (call.given(i, name) for i, name in enumerate(("input", "weight", "bias")))
    if groups_of(call.node) != 1:
        return False
    out, read, written = removal.axes[call.node], removal.dims(x), removal.dims(weight)
    spatial = len(written) - 2
    for axis in (*written[2:], *(a for dims in (read, out) for a in dims[len(dims) - spatial :])):
        axis.keep()
    if isinstance(bias, fx.Node):
        removal.dims(bias)[0].join(written[0])
    batch = LETTERS[: len(out) - spatial - 1]
    positions, edges, taps = ("".join(chr(ord(c) + d) for d in range(spatial)) for c in "mru")
    return removal.contraction([(x, batch + "X" + positions), (weight, "ZX" + taps)], batch + "Z" + edges, call)


@op(
    F.linear, F.conv1d, F.conv2d, F.conv3d,
    traits={Trait.WEIGHTED}, cut=layer_like,
)  # fmt: skip
def functional_layer(call: Call) -> Labels:
    """A layer written as a function. A weight read straight from a parameter is shared like a layer's own."""
    weight_node, bias_node = weight_of(call.node), call.given(2, "bias")
    direct = isinstance(weight_node, fx.Node) and weight_node.op == "get_attr"
    source = str(weight_node.target) if direct else None
    groups = call.argument(6, "groups", 1)
    weight = call.argument(1, "weight")
    dim = -1 if weight.ndim == 2 else 1 - weight.ndim
    if source is None or groups != 1:
        # Every parameter in them acts as a whole.
        call.findings.opaque.update(sources(weight_node), sources(bias_node))
        return _depthwise(call, groups, dim) if bias_node is None else call.all_on()
    labels = None if call.is_empty else read_along(call, call.label(0), dim)
    call.reads(source, call.argument(0, "input").shape[dim], labels)
    if source in call.output_weights:
        return call.all_on()
    written = call.space.feature_leaves(source, weight.shape[0])
    if bias_node is not None:
        call.space.meet(written, call.labels_of(bias_node))
    return call.mask_own(written, dim)


def _depthwise(call: Call, groups: int, dim: int) -> Labels:
    """A filter of its own for each channel: zero where the channel is."""
    labels: Tensor = call.label(0)
    if not 1 < groups == labels.shape[dim]:
        return call.all_on()
    merged = call.space.merge(labels, range(dim + 1, 0))
    return merged.repeat_interleave(call.out.shape[dim] // groups, dim).expand(call.out.shape)

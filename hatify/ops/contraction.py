"""Products that sum over a dimension: matrix products, attention, einsum, and layers written as functions."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import hatify.ops.resize as resize
from hatify.axes import Axes
from hatify.labels import ON, ZERO, is_leaf, unexpanded, varying_dims
from hatify.nn.connection import Connection
from hatify.ops.registry import AsLayer, Call, Labels, op, sources
from hatify.ops.weighted import Read, WeightedCall, as_function, as_product, given, read_as_it_is, with_added

#: Names for the dimensions of a batch.
LETTERS = "abcdefghijkl"


def product(call: Call) -> Axes | None:
    """(… M K) @ (… K N)."""
    second = "other" if call.given(1, "mat2") is None else "mat2"
    a, b = call.argument(0, "input"), call.argument(1, second)
    if min(a.ndim, b.ndim) < 2:
        return None
    batch = LETTERS[: max(a.ndim, b.ndim) - 2]
    first, other = (batch[len(batch) + 2 - t.ndim :] for t in (a, b))
    operands = [(call.given(0, "input"), (*first, "X", "Y")), (call.given(1, second), (*other, "Y", "Z"))]
    return call.axes(operands, (*batch, "X", "Z"))


def _product_layer(node: fx.Node, net: nn.Module) -> WeightedCall | None:
    """A product of an activation and a parameter."""
    return _layer_of(net, given(node, 0, "input"), given(node, 1, "mat2", node.kwargs.get("other")))


def _layer_of(net: nn.Module, a: Any, b: Any) -> WeightedCall | None:
    """The layer that ``a @ b`` is; of a batch of matrices, each is for a feature along the first dimension."""
    found = _weight_among(net, a, b)
    if found is None or len(found[1].dims) not in (2, 3):
        return None
    (right, read), many = found, len(found[1].dims) == 3
    h, k = "h" if many and read.shape[0] > 1 else "", "h" if many else ""
    letters = (f"...{h}mi", f"{k}io", f"...{h}mo") if right else (f"...{h}in", f"{k}oi", f"...{h}on")
    return as_product(net, *((a, b) if right else (b, a)), *letters)


def _weight_among(net: nn.Module, *operands: Any) -> tuple[int, Read] | None:
    """The one operand that is a parameter, and its place; None if none is, or several are."""
    reads = [read_as_it_is(operand, net) for operand in operands]
    found = [(i, read) for i, read in enumerate(reads) if read is not None and isinstance(read.value, nn.Parameter)]
    return found[0] if len(found) == 1 else None


@op(
    torch.matmul, torch.bmm, torch.mm, operator.matmul, "matmul", "bmm", "mm", "__matmul__",
    cut=product, layer=_product_layer,
)  # fmt: skip
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


def _sum_layer(node: fx.Node, net: nn.Module) -> WeightedCall | None:
    """A product of an activation and a parameter, and a bias."""
    added, a, b = (given(node, i, name) for i, name in enumerate(_SUMMED[node.target]))
    return with_added(_layer_of(net, a, b), added, net)


_SUMMED: dict[Any, tuple[str, str, str]] = {
    **dict.fromkeys((torch.addmm, "addmm"), ("input", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, "baddbmm"), ("input", "batch1", "batch2")),
}


def summed(call: Call) -> Axes | None:
    """(M K) @ (K N), and what is added."""
    added, a, b = (call.given(i, name) for i, name in enumerate(_SUMMED[call.node.target]))
    batch, bias = LETTERS[: call.out.ndim - 2], call.argument(0, "input")
    out = (*batch, "X", "Z")
    operands = [(added, out[len(out) - bias.ndim :]), (a, (*batch, "X", "Y")), (b, (*batch, "Y", "Z"))]
    return call.axes(operands, out)


@op(*_SUMMED, cut=summed, layer=_sum_layer)
def sum_with_product(call: Call) -> Labels:
    """β · input + α · (M K) @ (K N)."""
    added, a, b = (call.given(i, name) for i, name in enumerate(_SUMMED[call.node.target]))
    return call.space.either(call.labels_of(added), _product(call, *map(call.labels_of, (a, b)), a, b))


def _vector_layer(node: fx.Node, net: nn.Module) -> WeightedCall | None:
    """A product of a parameter and a vector, and perhaps a bias."""
    position = 1 if node.target in (torch.addmv, "addmv") else 0
    mat, vec = given(node, position, "mat" if position else "input"), given(node, position + 1, "vec")
    layer = as_product(net, vec, mat, "i", "oi", "o")
    return with_added(layer, given(node, 0, "input"), net) if position else layer


@op(torch.mv, torch.addmv, "mv", "addmv", layer=_vector_layer)
def matrix_and_vector(call: Call) -> Labels:
    """(M K) @ (K), of one sample."""
    return call.all_on()


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


def attended(call: Call) -> Axes | None:
    """softmax(q kᵀ + mask) v: every key is needed."""
    q, k, v = ((call.given(i, name), call.argument(i, name)) for i, name in enumerate(("query", "key", "value")))
    if call.kwargs.get("enable_gqa") or len({t.ndim for _, t in (q, k, v)}) > 1:
        return None
    batch = LETTERS[: q[1].ndim - 2]
    operands = [(q[0], (*batch, "X", "Y")), (k[0], (*batch, "J", "Y")), (v[0], (*batch, "J", "Z"))]
    bias = call.argument(3, "attn_mask")
    if isinstance(bias, Tensor):
        names = (*batch, "X", "J")
        operands.append((call.given(3, "attn_mask"), names[len(names) - bias.ndim :]))
    return call.axes(operands, (*batch, "X", "Z"), filled="J")


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


def by_equation(call: Call) -> Axes | None:
    """One letter for each axis."""
    equation, operands = _operands(call.node)
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    inputs, out = equation.split("->")
    return call.axes(list(zip(operands, map(tuple, inputs.split(",")), strict=True)), tuple(out))


def _operands(node: fx.Node) -> tuple[Any, list[Any]]:
    """The equation and the operands of a sum by Einstein's convention."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    return equation.replace(" ", "") if isinstance(equation, str) else equation, operands


def _equation_layer(node: fx.Node, net: nn.Module) -> WeightedCall | None:
    """A sum of products of an activation and a parameter."""
    equation, operands = _operands(node)
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    inputs, out = equation.split("->")
    names, found = inputs.split(","), _weight_among(net, *operands)
    if found is None or "." in names[found[0]]:
        return None
    weight, x = found[0], 1 - found[0]
    return as_product(net, operands[x], operands[weight], names[x], names[weight], out)


@op(torch.einsum, cut=by_equation, layer=_equation_layer)
def einsum(call: Call) -> Labels:
    """Two operands: as `matmul`; an output is non-zero only where the operand that holds its index may be."""
    equation, operands = _operands(call.node)
    if not isinstance(equation, str) or "." in equation or "->" not in equation or len(operands) != 2:
        return call.all_on()
    inputs, output = equation.split("->")
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


def layer_like(call: Call) -> Axes | None:
    """As a layer: the weight's rows go with the output's features, its columns with the input's."""
    weight = call.argument(1, "weight")
    groups = call.argument(6, "groups", 1)
    if groups != 1 or weight.ndim < 2:
        return None
    return _connecting(call, ("Z", "X"))


def upwards_like(call: Call) -> Axes | None:
    """As a transposed convolution."""
    return None if call.argument(6, "groups", 1) != 1 else _connecting(call, ("X", "Z"))


def _connecting(call: Call, features: tuple[str, str]) -> Axes | None:
    """The axes around a layer whose weight has these first dimensions: X, which the input has, and Z, the output's."""
    spatial = call.argument(1, "weight").ndim - 2
    batch = LETTERS[: call.out.ndim - spatial - 1]
    positions, edges, taps = (tuple(f"{kind}{d}" for d in range(spatial)) for kind in "xyw")
    operands = [
        (call.given(0, "input"), (*batch, "X", *positions)),
        (call.given(1, "weight"), (*features, *taps)),
        (call.given(2, "bias"), ("Z",)),
    ]
    return call.axes(operands, (*batch, "Z", *edges), whole=(*positions, *edges, *taps))


def _layer(connection: Connection, groups: int | None = None) -> AsLayer:
    """A layer that is given its input, weight and bias, and the number of groups in the place `groups`."""

    def layer(node: fx.Node, net: nn.Module) -> WeightedCall | None:
        x, weight, bias = (given(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
        count = 1 if groups is None else given(node, groups, "groups", 1)
        if not isinstance(count, int):
            return None
        return as_function(net, x, weight, bias, replace(connection, groups=count), constant=count == 1)

    return layer


def _register_layers() -> None:
    """Layers written as functions; those whose weights are parameters follow from the record."""
    op(F.linear, cut=layer_like, layer=_layer(Connection((0,), (1,), (-1,), (-1,))))(functional_layer)
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    for spatial, plain, upwards in zip((-2, -3, -4), (F.conv1d, F.conv2d, F.conv3d), transposed, strict=True):
        op(plain, cut=layer_like, layer=_layer(Connection((0,), (1,), (spatial,), (spatial,)), 6))(functional_layer)
        op(upwards, cut=upwards_like, layer=_layer(Connection((1,), (0,), (spatial,), (spatial,)), 6))(functional_layer)


def _lookup_layer(node: fx.Node, net: nn.Module) -> WeightedCall | None:
    """A table from which rows are looked up, unless that rescales them."""
    if given(node, 3, "max_norm") is not None:
        return None
    x, weight = given(node, 0, "input"), given(node, 1, "weight")
    return as_function(net, x, weight, None, Connection((1,), (), (-1,), ()))


def looking_up(call: Call) -> Axes | None:
    """A column of the table is a feature of the output."""
    lead = LETTERS[: call.out.ndim - 1]
    operands = [(call.given(0, "input"), tuple(lead)), (call.given(1, "weight"), ("rows", "Z"))]
    return call.axes(operands, (*lead, "Z"), whole=("rows",))


@op(F.embedding, cut=looking_up, layer=_lookup_layer)
def looked_up(call: Call) -> Labels:
    """Rows of a table that is computed."""
    return call.all_on()


def functional_layer(call: Call) -> Labels:
    """A layer whose weight is computed: every parameter in it acts as a whole."""
    weight, bias = call.given(1, "weight"), call.given(2, "bias")
    call.findings.opaque.update(sources(weight), sources(bias))
    if bias is not None:
        return call.all_on()
    # A filter of its own for each channel: zero where the channel is.
    labels: Tensor = call.label(0)
    groups, ndim = call.argument(6, "groups", 1), call.argument(1, "weight").ndim
    dim = -1 if ndim == 2 else 1 - ndim
    if not 1 < groups == labels.shape[dim]:
        return call.all_on()
    merged = call.space.merge(labels, range(dim + 1, 0))
    return merged.repeat_interleave(call.out.shape[dim] // groups, dim).expand(call.out.shape)


_register_layers()

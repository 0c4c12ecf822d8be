"""Weighted layers: one record for a layer that is called as a module and for the same layer written as a function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.answers import asks
from hatify.labels import ON
from hatify.nn.connection import Connection, WeightedCall
from hatify.nn.layers import family_of
from hatify.ops.reduction import read_along
from hatify.ops.registry import Call, Labels, Trait, has_trait, operation_of
from hatify.policy import Policy

#: The batch size for which to decide whether masking a layer's weight is cheaper than masking its output.
USUAL_BATCH = 8
#: Methods that leave every element of a parameter where it is.
_LEAVING = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"})


def layer_at(node: fx.Node, net: nn.Module) -> WeightedCall | None:
    """The weighted layer that `node` calls, as a module or by a function; None if it calls none."""
    if node.op != "call_module":
        known = operation_of(node)
        return None if known is None or known.layer is None else known.layer(node, net)
    path = str(node.target)
    module: Any = net.get_submodule(path)
    family = family_of(module)
    if family is None:
        return None
    x = node.args[0] if node.args else node.kwargs.get("x", node.kwargs.get("input"))
    weight, bias = (f"{path}.{name}" if path else name for name in ("weight", "bias"))
    has_bias = module._parameters.get("bias") is not None
    return WeightedCall(path, weight, bias if has_bias else None, x, family.connection(module), family.shape(module))


def layers_of(net: nn.Module, graphs: tuple[fx.Graph, ...]) -> dict[fx.Node, WeightedCall]:
    """The weighted layers that `graphs` call.

    A weight by which functions connect features in two ways, as one that a decoder has transposed, has two names.
    """
    found: dict[fx.Node, WeightedCall] = {}
    ways: dict[str, list[tuple[Any, ...]]] = {}
    for node in (n for graph in graphs for n in graph.nodes):
        layer = layer_at(node, net)
        if layer is None:
            continue
        if node.op != "call_module":
            connection, known = layer.connection, ways.setdefault(layer.weight, [])
            way = connection.written, connection.read, connection.groups
            if way not in known:
                known.append(way)
            place = known.index(way)
            layer = replace(layer, owner=f"{layer.owner}#{place + 1}") if place else layer
        found[node] = layer
    return found


# Parameters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """A parameter or buffer that is read as it is, but perhaps with its dimensions in another order.

    Attributes:
        name: its name.
        value: itself.
        dims: the dimension of `value` that each dimension of what is read is; None for one of size 1 that is new.
    """

    name: str
    value: Tensor
    dims: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        return tuple(1 if d is None else self.value.shape[d] for d in self.dims)


def read_as_it_is(node: Any, net: nn.Module) -> Read | None:
    """The parameter or buffer of floating-point numbers that `node` is; None if it is anything else."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and _rearranges(node):
        steps.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, attribute = str(node.target).rpartition(".")
    value = getattr(net.get_submodule(owner), attribute)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    dims = _rearranged(value.shape, steps[::-1])
    return None if dims is None else Read(str(node.target), value, dims)


def _rearranges(node: fx.Node) -> bool:
    """Whether `node` may do no more to its operand than give its dimensions another order, or cast it."""
    if node.op == "call_method" and node.target in _LEAVING:
        return bool(node.args)
    return has_trait(node, Trait.MOVES) and not asks(node) and node.all_input_nodes == [*node.args[:1]]


def _rearranged(shape: torch.Size, steps: list[fx.Node]) -> tuple[int | None, ...] | None:
    """The dimension of a tensor of this shape that each of the result's is; None if elements go otherwise.

    Views are told by their strides, and need no memory.
    """
    whole = torch.empty(shape, device="meta")
    view: Any = whole
    for step in steps:
        if step.target in _LEAVING:
            continue
        function: Any = getattr(Tensor, step.target) if isinstance(step.target, str) else step.target
        try:
            view = function(view, *step.args[1:], **step.kwargs)
        except RuntimeError:
            return None
        if not isinstance(view, Tensor) or view._base is not whole:
            return None
    if view.numel() != whole.numel():
        return None
    places = {whole.stride(d): d for d, size in enumerate(shape) if size > 1}
    single = [d for d, size in enumerate(shape) if size == 1]
    dims: list[int | None] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            dims.append(single.pop(0) if single else None)
        elif shape[place := places.get(stride, 0)] == size and whole.stride(place) == stride:
            dims.append(place)
        else:
            return None
    return tuple(dims)


def readers(graphs: tuple[fx.Graph, ...]) -> dict[str, set[fx.Node]]:
    """The nodes that compute something from each parameter or buffer that graphs read, behind what rearranges it."""
    found: dict[str, set[fx.Node]] = {}
    for node in (n for graph in graphs for n in graph.nodes if n.op == "get_attr"):
        found.setdefault(str(node.target), set()).update(_readers(node))
    return found


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        moved = user.args and user.args[0] is node
        if moved and _rearranges(user):
            yield from _readers(user)
        elif not asks(user) and (moved or user.target not in _LEAVING):  # else another tensor is cast like it
            yield user


# Layers written as functions -----------------------------------------------------------------------------------------


def given(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of the call at `node`, by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def as_function(
    owner: nn.Module, x: Any, weight: Any, bias: Any, connection: Connection, constant: bool = False
) -> WeightedCall | None:
    """The record of a layer written as a function; None if its weight is no parameter that is read as it is.

    Args:
        owner: the network.
        x: the activation's node.
        weight: the weight's node.
        bias: the bias's node, or None.
        connection: which features the entries connect, with the dimensions of what `weight` is.
        constant: whether a buffer will do as well.
    """
    read = read_as_it_is(weight, owner)
    if read is None or not (constant or isinstance(read.value, nn.Parameter)) or len(read.dims) < 2:
        return None
    written, contracted = (
        tuple(place for d in dims if (place := read.dims[d]) is not None)
        for dims in (connection.written, connection.read)
    )
    whole = len(written) == len(connection.written) and len(contracted) == len(connection.read)
    if not whole or (connection.groups > 1 and read.dims[:2] != (0, 1)) or read.name in (_root(x), _root(bias)):
        return None
    placed = replace(connection, written=written, read=contracted)
    layer = WeightedCall(read.name, read.name, None, x, placed, tuple(read.value.shape), bias)
    added = read_as_it_is(bias, owner)
    if added is None or not isinstance(added.value, nn.Parameter) or added.name == _root(x):
        return layer
    return replace(layer, bias=added.name) if added.value.shape == (layer.features,) else layer


def with_added(layer: WeightedCall | None, added: Any, net: nn.Module) -> WeightedCall | None:
    """`layer` with `added` added to its output; None unless that is a bias with one entry for each feature."""
    read = read_as_it_is(added, net)
    if layer is None or read is None or not isinstance(read.value, nn.Parameter):
        return None
    kept = [d for d in read.dims if d is not None]
    wide = [d - len(read.dims) for d, size in enumerate(read.shape) if size > 1]
    aligned = kept == sorted(kept) and set(wide) <= set(layer.connection.out)
    fits = aligned and read.value.numel() == layer.features and read.name not in (layer.weight, _root(layer.input))
    return replace(layer, bias=read.name, added=added) if fits else None


def _root(node: Any) -> str | None:
    """The parameter or buffer of which `node` is a part, or all; None if it is none."""
    while isinstance(node, fx.Node) and _rearranges(node):
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def as_product(net: nn.Module, x: Any, weight: Any, in_x: str, in_weight: str, in_out: str) -> WeightedCall | None:
    """The record of a sum of products of `x` and `weight`; a letter for each dimension of these and of the output.

    What comes before an ellipsis is counted from the front, else from the back. None if nothing is contracted, or if
    there are no features that only the weight has.
    """
    x_places, out_places, names = _places(in_x), _places(in_out), set(in_weight)
    repeated = any(len(set(found)) < len(found) for found in (in_x.replace("...", "."), in_weight))
    summed, new = names & x_places.keys() - out_places.keys(), names & out_places.keys() - x_places.keys()
    if repeated or not summed or not new:
        return None
    read, written = ([n for n in places if n in names] for places in (x_places, out_places))
    dims = (tuple(map(in_weight.index, written)), tuple(map(in_weight.index, read)))
    places = (tuple(out_places[n] for n in written), tuple(x_places[n] for n in read))
    return as_function(net, x, weight, None, Connection(*dims, *places))


def _places(names: str) -> dict[str, int]:
    """Where each letter's dimension lies."""
    front, ellipsis, back = names.partition("...")
    places = dict(enumerate(front)) if ellipsis else {}
    behind = back if ellipsis else front
    return {n: d for d, n in places.items()} | {n: d - len(behind) for d, n in enumerate(behind)}


# Labels --------------------------------------------------------------------------------------------------------------


def weighted(call: Call, layer: WeightedCall, policy: Policy) -> Labels:
    """A mask-carrying layer reads the labels of its input features and writes leaves of its own."""
    if policy is Policy.HEAD:
        return call.all_on()
    connection, read = layer.connection, None
    if connection.read:
        read = None if call.is_empty else _read(call, layer)
        call.reads(layer.owner, connection.count(connection.read, layer.shape), read)
    if policy is Policy.UNMASKED or not _fits(connection.out, connection.written, call.out.shape, layer):
        return call.all_on()
    written = call.space.feature_leaves(layer.owner, layer.features)
    if call.space.couple and read is not None and 1 < connection.groups == read.shape[0]:
        # A depthwise convolution filters each channel on its own: what comes out is the same feature.
        call.space.meet(written, read.repeat_interleave(layer.features // connection.groups))
    if call.module is not None:
        call.findings.fold.setdefault(layer.owner, math.prod(layer.shape) < USUAL_BATCH * call.out[:1].numel())
    if layer.added is not None and layer.bias is None:
        call.space.meet(written, call.labels_of(layer.added))
    return call.mask_own(written, connection.out)


def _fits(places: tuple[int, ...], dims: tuple[int, ...], shape: torch.Size, layer: WeightedCall) -> bool:
    """Whether the features along `dims` of the weight lie at these places of a tensor: none are spread."""
    sizes = [shape[d] if -len(shape) <= d < len(shape) else 0 for d in places]
    return math.prod(sizes) == layer.connection.count(dims, layer.shape)


def _read(call: Call, layer: WeightedCall) -> Tensor:
    """Labels of the input features (I,), in the order of the weight's."""
    labels: Tensor = call.labels_of(layer.input)
    connection, dims = layer.connection, layer.connection.input
    if connection.groups == 1:
        # Dimensions that are not there, or of size 1, are spread.
        labels = labels.view(*(1,) * -min(0, min(dims) + labels.ndim), *labels.shape)
        sizes = list(labels.shape)
        for d, in_weight in zip(dims, connection.read, strict=True):
            sizes[d] = layer.shape[in_weight] if sizes[d] == 1 else sizes[d]
        labels = labels.expand(sizes)
    if not _fits(dims, connection.read, labels.shape, layer):
        return torch.tensor(ON).expand(connection.count(connection.read, layer.shape))
    return read_along(call, labels, dims)

"""Operations that only move elements: the same operation, run on the labels, gives the labels of the result."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

import hatify.ops.resize as resize
from hatify.answers import asks
from hatify.axes import Axes, Moves, Source
from hatify.labels import ON, ZERO, is_raw, unexpanded, varying_dims
from hatify.notrace import timm_functions
from hatify.ops.registry import Along, Call, Labels, Operation, Trait, aligned, alike, behind, constant_labels, op

#: Names of the argument that is moved.
_FIRST = ("input", "tensors", "self", "x")

_MOVES = {Trait.MOVES, Trait.AFTER_HEADS}
_IN_ORDER = {*_MOVES, Trait.KEEPS_ORDER}


def run_on_labels(call: Call) -> Labels:
    """Run the operation on the labels of its first argument; every other argument keeps its value."""
    kwargs = dict(call.kwargs)
    name = next((n for n in _FIRST if not call.node.args and n in kwargs), None)
    source: Any = call.node.args[0] if name is None else call.node.kwargs[name]
    labels = call.labels_of(source)
    if has_computed_indices(call):
        labels = _read_anywhere(call, labels, _dims_read(call))
    elif isinstance(labels, Tensor) and not call.has_trait(Trait.KEEPS_ORDER):
        labels = _read_by_sizes(call, source, labels)
    elif call.operation is not None and call.operation.joins is not None:
        labels = _joined_by_sizes(call, source, labels, call.operation.joins)
    if labels is None:
        return call.all_on()
    if name is None:
        return _run(call, (labels, *call.args[1:]), kwargs)
    return _run(call, (), {**kwargs, name: labels})


# Indices and sizes ---------------------------------------------------------------------------------------------------


def has_computed_indices(call: Call) -> bool:
    """Whether a movement goes by tensors that follow from inputs, so that it may be another one than now."""
    if call.has_trait(Trait.BY_SHAPE):
        return False
    return any(isinstance(call.labels_of(node), Tensor) and _is_computed(call, node) for node in _amounts(call))


def _amounts(call: Call) -> set[fx.Node]:
    """The nodes that say how `call` moves."""
    moved: list[fx.Node] = []
    first = call.node.args[:1] or [call.node.kwargs.get(name) for name in _FIRST]
    fx.node.map_arg(first, moved.append)
    return set(call.node.all_input_nodes).difference(moved)


def _is_computed(call: Call, index: fx.Node) -> bool:
    """Whether an index follows from inputs, from parameters, or from random numbers."""
    unsteady = call.findings.unsteady
    return any(node.op in ("placeholder", "call_module") or node in unsteady for node in behind(index, asks))


def _read_anywhere(call: Call, labels: Labels, dims: set[int] | None) -> Labels:
    """`labels` where any index along `dims` may be read; None if these are where the features lie."""
    if dims is None or not isinstance(labels, Tensor):
        return None
    varying = set(varying_dims(labels))
    if varying and varying <= dims:
        return None
    return call.space.merge(labels, dims).expand(labels.shape)


def _dims_read(call: Call) -> set[int] | None:
    """The dimensions along which `call` reads at indices, if that is known."""
    if call.operation is None or call.operation.reads is None:
        return None
    dim = call.argument(*call.operation.reads)
    return {dim % call.label(0).ndim} if isinstance(dim, int) else None


def _read_by_sizes(call: Call, source: object, labels: Tensor) -> Labels:
    """`labels` where other sizes may read something else; None if it cannot be told what."""
    dims, everywhere = _dims_read(call), set(range(labels.ndim))
    if any(call.free.follows(node) for node in _amounts(call)):
        return _alike(call, labels, everywhere if dims is None else dims)
    return _alike(call, labels, call.free.dims(source) & (everywhere if dims is None else dims))


def _alike(call: Call, labels: Tensor, dims: set[int]) -> Labels:
    """`labels` made the same along `dims`, at which there is something else at other sizes; None if they cannot be.

    The rows of a raw parameter keep their own: which of them are read at any size is looked at in the end.
    """
    varying = set(varying_dims(labels))
    if not varying & dims or is_raw(labels):
        return labels
    return _read_anywhere(call, labels, dims)


def _joined_by_sizes(call: Call, source: object, labels: Sequence[Labels], along: Along) -> Labels:
    """The labels of tensors that are joined; alike where sizes say which of them lies where."""
    tensors = [label for label in labels if isinstance(label, Tensor)]
    dim = call.argument(*along)
    if len(tensors) < len(labels) or not isinstance(dim, int):
        return labels
    dim %= call.out.ndim
    pieces = source if isinstance(source, (tuple, list)) else [source]
    if not any(dim in call.free.dims(piece) for piece in pieces):
        return labels
    filled = [label for label in tensors if label.numel()]
    if len({label.ndim for label in tensors}) > 1 or all(map(is_raw, filled)):
        return labels
    if any(set(varying_dims(label)) == {dim} for label in filled):
        return None
    merged = call.space.merge(torch.cat(filled, dim), (dim,))
    return tuple(merged.expand(label.shape) for label in tensors)


def _run(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Labels:
    if _unknown((args, kwargs)):
        return call.all_on()
    if call.node.op == "call_method":
        target = getattr(torch.Tensor, str(call.node.target))
    else:
        target = call.module if call.node.op == "call_module" else call.node.target
    try:
        return target(*args, **kwargs)
    except RuntimeError:
        # Some kernels exist for floating point only; labels are small enough to be exact in float64.
        as_float = tree_map_only(Tensor, lambda t: t.double() if t.dtype == torch.int64 else t, args)
        return tree_map_only(Tensor, Tensor.long, target(*as_float, **kwargs))


# How extraction cuts ------------------------------------------------------------------------------------------------


def moved(call: Call) -> Moves | None:
    """Run the operation on the indices of the elements, one dimension of one operand at a time."""
    name = next((n for n in _FIRST if not call.node.args and n in call.node.kwargs), None)
    given: Any = call.node.args[0] if name is None else call.node.kwargs[name]
    pieces = given if isinstance(given, (tuple, list)) else [given]
    values = [call.value_of(piece) for piece in pieces if isinstance(piece, fx.Node)]
    outs = [t for t in tree_leaves(call.out) if isinstance(t, Tensor)]
    if len(values) < len(pieces) or not all(isinstance(t, Tensor) and t.numel() for t in (*values, *outs)):
        return None  # at other sizes there may be something
    loose = _read_otherwise(call, max(t.ndim for t in values))
    if loose is None:
        return None

    def run(numbered: int, index: Tensor) -> list[Tensor]:
        parts = [index if i == numbered else index.new_zeros(()).expand(v.shape) for i, v in enumerate(values)]
        first = parts[0] if pieces[0] is given else parts
        moved = _run(
            call, (first, *call.args[1:]) if name is None else (), {**call.kwargs, **({name: first} if name else {})}
        )
        return [t for t in tree_leaves(moved) if isinstance(t, Tensor)]

    sources = []
    for number, value in enumerate(values):
        inside = tuple(torch.ones((1,) * t.ndim, dtype=torch.bool) for t in outs)
        if not call.has_trait(Trait.KEEPS_ORDER):
            # What moves with all the numbers is an element; what stays the same is from elsewhere.
            none = torch.zeros((), dtype=torch.int64).expand(value.shape)
            pairs = zip(run(number, none), run(number, none + 1), strict=True)
            inside = tuple(unexpanded(b - a == 1) for a, b in pairs)
        maps: list[tuple[Tensor, ...] | None] = []
        for d, size in enumerate(value.shape):
            index = torch.arange(1, size + 1).view(-1, *(1,) * (value.ndim - 1 - d)).expand(value.shape)
            found = map(unexpanded, run(number, index)) if size > 1 else ()
            kept = tuple(_settled(t if i.all() else torch.where(i, t, 0)) for t, i in zip(found, inside, strict=False))
            maps.append(kept if size > 1 else None)
        sources.append(Source(pieces[number], tuple(maps), inside))
    by_shape = [n for n in call.node.all_input_nodes if n not in pieces] if call.has_trait(Trait.BY_SHAPE) else []
    return Moves(tuple(sources), tuple(t.shape for t in outs), frozenset(loose), tuple(by_shape))


def joined(call: Call) -> Moves | None:
    """What `moved` finds of tensors that are joined, without running it once for each of them."""
    given, dim = call.given(0, "tensors"), call.argument(1, "dim", 0)
    pieces = list(given) if isinstance(given, (tuple, list)) else []
    values = [call.value_of(piece) for piece in pieces]
    if not values or not isinstance(dim, int) or any(v.ndim != call.out.ndim or not v.numel() for v in values):
        return moved(call)
    shape, first = call.out.shape, 0
    sources = []
    for piece, value in zip(pieces, values, strict=True):
        index = torch.zeros(shape[dim], dtype=torch.int64)
        index[first : first + value.shape[dim]] = torch.arange(1, value.shape[dim] + 1)
        first += value.shape[dim]
        numbers = [torch.arange(1, size + 1) for size in shape]
        numbers[dim] = index
        placed = [n.view([-1 if e == d else 1 for e in range(len(shape))]) for d, n in enumerate(numbers)]
        maps = tuple((placed[d],) if size > 1 else None for d, size in enumerate(value.shape))
        sources.append(Source(piece, maps, (placed[dim] > 0,)))
    return Moves(tuple(sources), (shape,))


def _read_otherwise(call: Call, ndim: int) -> set[int] | None:
    """The dimensions along which other inputs may be read at other indices than now, or every so many; None: any."""
    if call.node.target is operator.getitem:
        computed, by_sizes = _dims_of_keys(call, ndim)
        stepping = [dims for _, key, dims in _keys(call, ndim) if isinstance(key, slice) and key.step not in (None, 1)]
        return computed.union(by_sizes, *stepping)
    return _dims_read(call) if has_computed_indices(call) else set()


def _settled(index: Tensor) -> Tensor:
    """`index` with every dimension along which it is constant, but for zeros, reduced to size 1."""
    index = unexpanded(index)
    for d, size in enumerate(index.shape):
        if size > 1 and bool((index == 0).any()):
            high = index.amax(d, keepdim=True)
            if bool(((index == high) | (index == 0)).all()):
                index = high
    return index


#: Functions that timm keeps tracing out of, and that are found to move: partitions into windows, and reshapes.
_OF_TIMM = Operation(run_on_labels, frozenset({Trait.MOVES, Trait.KEEPS_ORDER}), moved)


# The movements -------------------------------------------------------------------------------------------------------


def _moving(*targets: Any, traits: set[Trait] = _MOVES, **known: Any) -> None:
    op(*targets, traits=traits, **{"cut": moved, **known})(run_on_labels)


_moving(torch.reshape, "reshape", "view", traits=_IN_ORDER, resize=resize.to_sizes)
_moving(torch.unflatten, "unflatten", traits=_IN_ORDER, resize=resize.unflattened)
_moving(torch.broadcast_to, "expand", "broadcast_to", traits=_IN_ORDER, resize=resize.spread)
_moving("view_as", "reshape_as", "expand_as", traits={*_IN_ORDER, Trait.BY_SHAPE})
_moving(
    torch.flatten, torch.ravel, torch.permute, torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim,
    torch.moveaxis, torch.t, torch.adjoint, torch.squeeze, torch.unsqueeze, torch.atleast_2d, torch.tile,
    torch.repeat_interleave, torch.clone, torch.detach, torch.stack, nn.Flatten, nn.Unflatten, nn.Identity,
    "flatten", "ravel", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint",
    "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "tile", "repeat", "repeat_interleave", "contiguous", "clone",
    "detach",
    traits=_IN_ORDER,
)  # fmt: skip
_moving(
    torch.chunk, torch.split, torch.tensor_split, torch.split_with_sizes, "chunk", "split", "tensor_split",
    "split_with_sizes",
    reads=Along(2, "dim", 0), resize=resize.pieces,
)  # fmt: skip
_moving(torch.unbind, "unbind", reads=Along(1, "dim", 0))
_moving(torch.select, "select", reads=Along(1, "dim"), resize=resize.selected)
_moving(torch.narrow, "narrow", reads=Along(1, "dim"), resize=resize.narrowed)
_moving(torch.index_select, torch.gather, "index_select", "gather", reads=Along(1, "dim"))
_moving(torch.take_along_dim, "take_along_dim", reads=Along(2, "dim"))
_moving(torch.roll, "roll", reads=Along(2, "dims"))
_moving(
    torch.flip, torch.rot90, torch.tril, torch.triu, torch.diagonal, torch.as_strided, F.unfold, nn.Unfold,
    torch.channel_shuffle, torch.pixel_shuffle, torch.pixel_unshuffle, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    "flip", "tril", "triu", "diagonal", "as_strided", "unfold",
)  # fmt: skip
_moving(torch.cat, torch.concat, torch.concatenate, joins=Along(1, "dim", 0), cut=joined)
_moving(torch.hstack, joins=Along(1, "dim", 1))
_moving(torch.vstack, joins=Along(1, "dim", 0))


@op(torch.broadcast_tensors, torch.meshgrid, traits={Trait.MOVES, Trait.KEEPS_ORDER})
def run_on_all_labels(call: Call) -> Labels:
    """The same for operations that move several tensors at once."""
    return _run(call, tuple(call.labels_of(arg) for arg in call.node.args), call.kwargs)


def _unknown(arguments: Any) -> bool:
    """Whether some index has no values: it is on the meta device."""
    return any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(arguments))


def found_to_move(call: Call) -> Labels:
    """Labels of a function without a rule that is found to move elements of its first argument; None if it does more.

    Found by experiment: given the numbers of the elements, it must return such numbers (or the zeros it pads with), and
    given noise, the elements so numbered.
    """
    if call.node.op != "call_function" or not call.args or not isinstance(call.args[0], Tensor):
        return None
    of_timm = call.node.target in timm_functions()
    if not of_timm and call.node.target not in torch.overrides.get_testing_overrides():
        return None  # code of others, which may do something else with other sizes or values
    others = tree_leaves((call.args[1:], call.kwargs))
    if any(isinstance(t, Tensor) and t.is_floating_point() for t in others):
        return None  # a second operand may just happen to be zero now
    if _amounts(call) and any(isinstance(t, float) for t in others):
        return None  # likewise a number that a size gives
    x, move = call.args[0], call.node.target
    assert callable(move)
    numbers = torch.arange(1, x.numel() + 1, dtype=torch.float64)
    noise = torch.randn(x.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        moved, found = (tree_leaves(move(v.view(x.shape), *call.args[1:], **call.kwargs)) for v in (numbers, noise))
    except (RuntimeError, TypeError, ValueError):
        return None
    values = torch.cat((torch.zeros(1, dtype=torch.float64), noise))
    for numbered, value in zip(moved, found, strict=True):
        if not isinstance(numbered, Tensor):
            continue
        if not numbered.is_floating_point():
            return None
        inside = (numbered >= 0) & (numbered <= x.numel()) & (numbered == numbered.round())
        if not inside.all() or not torch.equal(values[numbered.long()], value):
            return None
    if of_timm:
        call.operation = _OF_TIMM
    return run_on_labels(call)


@op(operator.getitem, traits=_MOVES, cut=moved, resize=resize.indexed)
def item(call: Call) -> Labels:
    """An element of a container, or an indexed tensor."""
    labels = call.label(0)
    if isinstance(labels, Tensor):
        if _unknown(call.args[1]):
            return call.all_on()
        computed, by_sizes = _dims_of_keys(call, labels.ndim)
        if computed:
            labels = _read_anywhere(call, labels, computed)
        if isinstance(labels, Tensor):
            labels = _alike(call, labels, by_sizes)
        if labels is None:
            return call.all_on()
    return None if labels is None else labels[call.args[1]]


def _dims_of_keys(call: Call, ndim: int) -> tuple[set[int], set[int]]:
    """The dimensions that ``x[…]`` reads at computed indices, and those of which it reads another part by sizes."""
    free = call.free.dims(call.node.args[0])
    computed: set[int] = set()
    by_sizes: set[int] = set()
    for key, _, dims in _keys(call, ndim):
        amounts: list[fx.Node] = []
        fx.node.map_arg(key, amounts.append)
        if any(_is_computed(call, node) for node in amounts):
            computed |= dims
        if key != slice(None):
            by_sizes |= dims if any(map(call.free.follows, amounts)) else dims & free
    return computed, by_sizes


def _keys(call: Call, ndim: int) -> list[tuple[Any, Any, set[int]]]:
    """What ``x[…]`` is given, in the graph and as values, and the dimensions that each concerns."""
    keys, values = call.node.args[1], call.args[1]
    if not isinstance(keys, (tuple, list)):
        keys, values = (keys,), (values,)
    used = [
        0 if v is None or v is ... else v.ndim if isinstance(v, Tensor) and v.dtype == torch.bool else 1 for v in values
    ]
    found, dim = [], 0
    for key, value, count in zip(keys, values, used, strict=True):
        found.append((key, value, set(range(dim, dim + count))))
        dim += ndim - sum(used) if value is ... else count
    return found


@op(getattr, traits={Trait.MOVES}, cut=moved)
def attribute(call: Call) -> Labels:
    """``x.T`` and ``x.mT`` move data; other attributes (shape, device, …) carry no labels."""
    labels = call.label(0)
    if isinstance(labels, Tensor) and isinstance(call.out, Tensor):
        moved = call.args[1] in ("T", "mT", "H", "mH", "data")
        return getattr(labels, call.args[1]) if moved else call.all_on()
    return call.all_on()


@op(
    F.pad, torch._C._nn.pad, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    traits={Trait.MOVES}, cut=moved, resize=resize.padded,
)  # fmt: skip
def pad(call: Call) -> Labels:
    """Padding moves data; what a constant pads with is on unless it is zero."""
    module: Any = call.module
    if module is None:
        padding, mode, value = call.argument(1, "pad"), call.argument(2, "mode", "constant"), call.argument(3, "value")
    else:
        padding, mode, value = module.padding, "constant", 0
    labels = _padded_by_sizes(call, padding, mode)
    if labels is None or call.is_empty:
        return call.all_on()
    if mode != "constant":
        return _run(call, (labels, padding, mode), {})
    if value or isinstance(call.given(3, "value"), fx.Node):
        return F.pad(labels, padding, value=ON)
    # How far positions are padded may depend on a size: the zeros behind them count as more of the same.
    labels = unexpanded(labels)
    padding = [n if labels.shape[-1 - i // 2] > 1 else 0 for i, n in enumerate(padding)]
    return F.pad(labels, padding, value=ZERO).expand(call.out.shape)


def _padded_by_sizes(call: Call, padding: Sequence[int], mode: str) -> Labels:
    """Labels of what is padded or, by negative amounts, cropped; None where it cannot be told what lies where."""
    labels, given = call.label(0), call.given(1, "pad")
    free = call.free.dims(call.given(0, "input"))
    dims = set()
    for i, n in enumerate(padding):
        dim = labels.ndim - 1 - i // 2
        amount = given[i] if isinstance(given, (tuple, list)) else given
        by_size = isinstance(amount, fx.Node) and call.free.follows(amount)
        if by_size or (dim in free and (n < 0 or mode != "constant")):
            dims.add(dim)
    return _alike(call, labels, dims)


def like_the_first(call: Call) -> Axes | None:
    """The axes of the output are those of what is cast; what another tensor is asked for is its dtype."""
    return call.axes([(call.given(0, "self"), aligned(call.out))], aligned(call.out))


@op("to", "float", traits={Trait.ELEMENTWISE, Trait.AFTER_HEADS}, cut=like_the_first)
@op("double", "half", "bfloat16", "type", "type_as", "cuda", "cpu", traits={Trait.ELEMENTWISE}, cut=like_the_first)
def cast(call: Call) -> Labels:
    """Casts and moves between devices."""
    return call.label(0)


@op(torch.zeros, resize=resize.in_aten_by_sizes, traits={Trait.FACTORY})
@op("new_zeros", traits={Trait.FACTORY})
@op(torch.zeros_like, "zero_", traits={Trait.ELEMENTWISE}, cut=alike)
def zeros(call: Call) -> Labels:
    """Fresh zeros."""
    return constant_labels(call.out, ZERO)


@op(torch.empty, torch.ones, torch.rand, torch.randn, resize=resize.in_aten_by_sizes, traits={Trait.FACTORY})
@op(torch.arange, torch.eye, torch.full, torch.linspace, resize=resize.in_aten, traits={Trait.FACTORY})
@op("new_empty", traits={Trait.FACTORY})
@op(torch.empty_like, traits={Trait.ELEMENTWISE}, cut=alike)
def made(call: Call) -> Labels:
    """Fresh tensors of other numbers. Uninitialised memory is the network's own business."""
    return call.all_on()

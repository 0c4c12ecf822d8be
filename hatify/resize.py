"""Rewrite the calls that mention sizes and positions, for values that have lost indices."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from hatify.axes import Axis, Dims

_SPLITS = ("split", "chunk", "tensor_split", "split_with_sizes")
#: torch's functions that make tensors from sizes. Unpickling traces the code again, which only their twins in
#: ``torch.ops`` can bear.
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")
_PADS = (F.pad, torch._C._nn.pad)


class CannotCut(Exception):
    """A call cannot do without the indices that are to go."""


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def resized(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], axes: dict[fx.Node, Any]) -> Call:
    """Target and arguments of `node` for what is kept of its input and output.

    Args:
        node: a call of a function or method.
        args: its arguments in the new graph.
        kwargs: the same.
        axes: of every node.

    Raises:
        CannotCut: the call has no such form.
    """
    name = str(getattr(node.target, "__name__", node.target))
    if name in _FACTORIES and node.target is getattr(torch, name) and node.all_input_nodes:
        one_by_one = name not in ("arange", "eye", "full", "linspace")
        return getattr(torch.ops.aten, name), ([*_unpacked(args)],) if one_by_one else args, kwargs
    source: Any = axes.get(_first(node))
    out = axes[node]
    dims = [d for d in tree_leaves((source, out)) if isinstance(d, Dims)]
    if not any(axis.cut for d in dims for axis in d):
        return node.target, args, kwargs
    if name == "scaled_dot_product_attention":
        return node.target, args, {"scale": source[-1].kept.numel() ** -0.5, **kwargs}
    if not isinstance(source, Dims):
        return node.target, args, kwargs
    if name in ("reshape", "view"):
        shape = _unpacked(args[1:] or (kwargs.get("shape", kwargs.get("size")),))
        if len(shape) != len(out):
            raise CannotCut  # one value holds all sizes, or another dtype
        return node.target, (args[0], _sizes(shape, out)), {}
    if name in ("expand", "broadcast_to"):
        spread = [_count(a) if a.cut and size != -1 else size for size, a in zip(_unpacked(args[1:]), out, strict=True)]
        return node.target, (args[0], spread), kwargs
    if name == "unflatten":
        dim, sizes = args[1] % len(source), args[2]
        return node.target, (*args[:2], _sizes(sizes, out[dim : dim + len(sizes)])), kwargs
    if name in _SPLITS:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        if not isinstance(dim, int):
            raise CannotCut
        if not any(dims[dim].cut for dims in (source, *out)):
            return node.target, args, kwargs
        return torch.split, (args[0], [_count(part[dim]) for part in out], dim), {}
    if name == "narrow" and len(args) == 4 and source[args[1]].cut:
        if not all(isinstance(a, int) for a in args[2:]):
            raise CannotCut
        kept, start, length = source[args[1]].kept, args[2], args[3]
        return node.target, (*args[:2], int(kept[:start].sum()), int(kept[start : start + length].sum())), kwargs
    if name == "select" and len(args) == 3:
        return node.target, (*args[:2], _position(args[2], source[args[1]])), kwargs
    if node.target is operator.getitem:
        return node.target, (args[0], _index(args[1], source)), kwargs
    if node.target in _PADS:
        return (
            node.target,
            (args[0], _padding(args[1] if len(args) > 1 else kwargs["pad"], out), *args[2:]),
            {k: v for k, v in kwargs.items() if k != "pad"},
        )
    return node.target, args, kwargs


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else node.kwargs.get("input")


def _unpacked(sizes: tuple[Any, ...]) -> Sequence[Any]:
    """Sizes that are given one by one, or together."""
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _count(axis: Axis) -> int:
    return int(axis.kept.sum())


def _sizes(sizes: Sequence[Any], dims: Sequence[Axis]) -> tuple[Any, ...]:
    """Sizes with those that were cut replaced; one of them, if it depends on the input, is left to torch."""
    result = [_resized(size, axis) if axis.cut else size for size, axis in zip(sizes, dims, strict=True)]
    if sum(isinstance(size, int) and size == -1 for size in result) > 1:
        raise CannotCut
    return tuple(result)


def _resized(size: Any, axis: Axis) -> int:
    return -1 if isinstance(size, fx.Node) or size == -1 else _count(axis)


def _position(index: Any, axis: Axis) -> Any:
    """Where a kept index has moved."""
    if not axis.cut:
        return index
    if not isinstance(index, int):
        raise CannotCut
    return int(axis.kept[: index % axis.kept.numel()].sum())


def _index(index: Any, dims: Dims) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    result: list[Any] = []
    d = 0
    for item in items:
        if item is None:
            result.append(item)
        elif item is Ellipsis:
            result.append(item)
            d += len(dims) - taken
        else:
            result.append(_slice(item, dims[d]) if isinstance(item, slice) else _position(item, dims[d]))
            d += 1
    return tuple(result) if isinstance(index, tuple) else result[0]


def _slice(piece: slice, axis: Axis) -> slice:
    """The slice of the kept indices that holds those in `piece`."""
    if not axis.cut or piece == slice(None):
        return piece
    if any(isinstance(end, fx.Node) for end in (piece.start, piece.stop, piece.step)):
        raise CannotCut
    positions = (axis.kept.cumsum(0) - 1)[piece][axis.kept[piece]].tolist()
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if positions != list(range(positions[0], positions[-1] + 1, step)):
        raise CannotCut
    return slice(positions[0], positions[-1] + 1, step)


def _padding(padding: Sequence[Any], out: Dims) -> list[Any]:
    """How much of the padding is kept."""
    result = list(padding)
    for j in range(len(padding) // 2):
        axis, before, after = out[-1 - j], padding[2 * j], padding[2 * j + 1]
        if axis.cut and isinstance(before, int) and isinstance(after, int):
            result[2 * j] = int(axis.kept[:before].sum())
            result[2 * j + 1] = int(axis.kept[axis.kept.numel() - after :].sum()) if after else 0
    return result

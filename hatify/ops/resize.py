"""How calls that mention sizes and positions are rewritten for values that have lost indices, or got more.

What is left of an axis is given as bool, whether each index is still there, or as int64, how many there are in its
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hatify.axes import Kept
from hatify.ops.registry import Resizing, Rewritten


class CannotCut(Exception):
    """A call cannot do without the indices that are to go."""


def to_sizes(call: Resizing) -> Rewritten:
    """``reshape``: sizes that were cut become others; one that depends on the input is left to torch."""
    shape = _unpacked(call.args[1:] or (call.kwargs.get("shape", call.kwargs.get("size")),))
    if len(shape) != len(call.out):
        raise CannotCut  # one value holds all sizes, or another dtype
    return call.node.target, (call.args[0], _sizes(shape, call.out)), {}


def spread(call: Resizing) -> Rewritten:
    """``expand``."""
    sizes = zip(_unpacked(call.args[1:]), call.out, strict=True)
    counts = [_count(axis) if is_cut(axis) and size != -1 else size for size, axis in sizes]
    return call.node.target, (call.args[0], counts), call.kwargs


def unflattened(call: Resizing) -> Rewritten:
    """``unflatten``."""
    dim, sizes = call.args[1] % len(call.source), call.args[2]
    found = _sizes(sizes, call.out[dim : dim + len(sizes)])
    return call.node.target, (*call.args[:2], found), call.kwargs


def pieces(call: Resizing) -> Rewritten:
    """``split`` and ``chunk``: into pieces of as many as are kept."""
    dim = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else 0)
    if not isinstance(dim, int):
        raise CannotCut
    if not any(is_cut(dims[dim]) for dims in (call.source, *call.out)):
        return call.node.target, call.args, call.kwargs
    return torch.split, (call.args[0], [_count(part[dim]) for part in call.out], dim), {}


def narrowed(call: Resizing) -> Rewritten:
    """``narrow``."""
    if len(call.args) != 4 or not is_cut(call.source[call.args[1]]):
        return call.node.target, call.args, call.kwargs
    if not all(isinstance(a, int) for a in call.args[2:]):
        raise CannotCut
    kept, start, length = call.source[call.args[1]], call.args[2], call.args[3]
    found = int(kept[:start].sum()), int(kept[start : start + length].sum())
    return call.node.target, (*call.args[:2], *found), call.kwargs


def selected(call: Resizing) -> Rewritten:
    """``select``."""
    if len(call.args) != 3:
        return call.node.target, call.args, call.kwargs
    place = _position(call.args[2], call.source[call.args[1]])
    return call.node.target, (*call.args[:2], place), call.kwargs


def indexed(call: Resizing) -> Rewritten:
    """``x[…]``."""
    return call.node.target, (call.args[0], _index(call.args[1], call.source)), call.kwargs


def padded(call: Resizing) -> Rewritten:
    """``pad``."""
    padding = call.args[1] if len(call.args) > 1 else call.kwargs["pad"]
    rest = {name: value for name, value in call.kwargs.items() if name != "pad"}
    return call.node.target, (call.args[0], _padding(padding, call.out), *call.args[2:]), rest


def scaled_as_before(call: Resizing) -> Rewritten:
    """Attention over fewer features divides by the root of as many as there were."""
    return call.node.target, call.args, {"scale": call.source[-1].numel() ** -0.5, **call.kwargs}


def in_aten(call: Resizing) -> Rewritten:
    """A function that makes a tensor from sizes: unpickling traces the code again, which only its twin can bear."""
    return getattr(torch.ops.aten, call.node.target.__name__), call.args, call.kwargs  # type: ignore[union-attr]


def in_aten_by_sizes(call: Resizing) -> Rewritten:
    """Likewise, where sizes may be given one by one."""
    target, args, kwargs = in_aten(call)
    return target, ([*_unpacked(args)],), kwargs


def _unpacked(sizes: tuple[Any, ...]) -> Sequence[Any]:
    """Sizes that are given one by one, or together."""
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def is_cut(axis: Tensor) -> bool:
    """Whether anything is left out along an axis, or added."""
    return bool((axis != 1).any())


def _count(axis: Tensor) -> int:
    return int(axis.sum())


def _sizes(sizes: Sequence[Any], dims: Sequence[Tensor]) -> tuple[Any, ...]:
    """Sizes with those that were cut replaced; one of them, if it depends on the input, is left to torch."""
    result = [_resized(size, axis) if is_cut(axis) else size for size, axis in zip(sizes, dims, strict=True)]
    if sum(isinstance(size, int) and size == -1 for size in result) > 1:
        raise CannotCut
    return tuple(result)


def _resized(size: Any, axis: Tensor) -> int:
    return -1 if isinstance(size, fx.Node) or size == -1 else _count(axis)


def _position(index: Any, axis: Tensor) -> Any:
    """Where a kept index has moved."""
    if not is_cut(axis):
        return index
    if not isinstance(index, int):
        raise CannotCut
    return int(axis[: index % axis.numel()].sum())


def _index(index: Any, dims: Kept) -> Any:
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


def _slice(piece: slice, axis: Tensor) -> slice:
    """The slice of the kept indices that holds those in `piece`."""
    if not is_cut(axis) or piece == slice(None):
        return piece
    if any(isinstance(end, fx.Node) for end in (piece.start, piece.stop, piece.step)):
        raise CannotCut
    if axis.dtype != torch.bool:
        start, stop, step = piece.indices(len(axis))
        if step != 1:
            raise CannotCut
        return slice(int(axis[:start].sum()), int(axis[:stop].sum()))
    positions = (axis.cumsum(0) - 1)[piece][axis[piece]].tolist()
    if not positions:
        raise CannotCut
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if positions != list(range(positions[0], positions[-1] + 1, step)):
        raise CannotCut
    return slice(positions[0], positions[-1] + 1, step)


def _padding(padding: Sequence[Any], out: Kept) -> list[Any]:
    """How much of the padding is kept."""
    result = list(padding)
    for j in range(len(padding) // 2):
        axis, before, after = out[-1 - j], padding[2 * j], padding[2 * j + 1]
        if is_cut(axis) and isinstance(before, int) and isinstance(after, int):
            result[2 * j] = int(axis[:before].sum())
            result[2 * j + 1] = int(axis[axis.numel() - after :].sum()) if after else 0
    return result

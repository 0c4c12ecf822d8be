"""What is needed of each value of a baked network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hatify.answers import asks
from hatify.axes import Axes, Kept, Moves, Name, everything, levelled
from hatify.extract.zeros import Zeros

#: What is kept along each dimension of each tensor that a node makes.
KeptOf = dict[fx.Node, list[Kept]]


def needed(zeros: Zeros) -> KeptOf:
    """What of each value has to be there for the outputs to be what they are.

    What is not read of a value at all, as what lies beside a slice, is not worth taking out.
    """
    everywhere = {node: [everything([len(k) for k in kept]) for kept in own] for node, own in zeros.nonzero.items()}
    read = _Wanted(zeros, everywhere).wanted
    return _Wanted(zeros, zeros.nonzero, read).wanted


class _Wanted:
    """Asks, from the outputs back, for what each operation needs of its operands.

    Args:
        zeros: the network, and how its axes belong together.
        nonzero: where each value may be non-zero.
        read: what is read of each value; what is not is asked for, too.
    """

    def __init__(self, zeros: Zeros, nonzero: KeptOf, read: KeptOf | None = None) -> None:
        self.zeros, self.nonzero = zeros, nonzero
        self.wanted: KeptOf = {}
        for node in reversed(zeros.graph.nodes):
            axes, own = zeros.axes.get(node), self.wanted.get(node, self.nonzero[node])
            if read is not None:
                own = [tuple(a | ~b for a, b in zip(*pair, strict=True)) for pair in zip(own, read[node], strict=True)]
            own = self.wanted[node] = [self._some(node, kept) for kept in own]
            if node in zeros.items:
                self._want_item(node, own)
            elif isinstance(axes, Axes):
                self._want_by_name(axes, own)
            elif isinstance(axes, Moves):
                self._want_moved(node, axes, own)
            elif not asks(node):
                for operand in node.all_input_nodes:
                    self._want(operand, self.nonzero[operand])

    def _want(self, node: fx.Node, kept: list[Kept]) -> None:
        before = self.wanted.get(node)
        if before is not None:
            kept = [tuple(a | b for a, b in zip(*pair, strict=True)) for pair in zip(kept, before, strict=True)]
        self.wanted[node] = kept

    def _some(self, node: fx.Node, kept: Kept) -> Kept:
        """Everything along dimensions whose size is free; something along every other."""
        free = self.zeros.findings.free.dims(node)
        return tuple(torch.ones_like(k) if d in free else something(k) for d, k in enumerate(kept))

    def _want_item(self, node: fx.Node, own: list[Kept]) -> None:
        source: Any = node.args[0]
        kept = [tuple(torch.zeros_like(k) for k in dims) for dims in self.nonzero[source]]
        for place, dims in zip(self.zeros.items[node], own, strict=True):
            kept[place] = dims
        self._want(source, kept)

    def _want_by_name(self, axes: Axes, outs: list[Kept]) -> None:
        found = completed(axes, by_name(axes.outs, outs) | summed(axes, self.nonzero))
        for node, names in axes.operands:
            (own,) = self.nonzero[node]
            asked = named(names, found, own)
            filled = (n in axes.filled for n in names)
            self._want(node, [tuple(k if f else a for a, k, f in zip(asked, own, filled, strict=True))])

    def _want_moved(self, node: fx.Node, moves: Moves, outs: list[Kept]) -> None:
        for source in moves.sources:
            (own,) = self.nonzero[source.node]
            self._want(source.node, [moves.asked(source, outs, [len(k) for k in own])])
        for operand in node.all_input_nodes:
            if operand in moves.by_shape:
                self._want(operand, outs)
            elif operand not in {source.node for source in moves.sources}:
                self._want(operand, [everything([len(k) for k in kept]) for kept in self.nonzero[operand]])


def by_name(names: Iterable[Sequence[Name | None]], kept: Iterable[Kept]) -> dict[Name, Tensor]:
    """What is kept of any of several tensors along each name."""
    found: dict[Name, Tensor] = {}
    for own, dims in zip(names, kept, strict=True):
        for name, k in zip(own, dims, strict=True):
            if name is not None:
                found[name] = found[name] | k if name in found else k
    return found


def summed(axes: Axes, nonzero: KeptOf) -> dict[Name, Tensor]:
    """Where no operand is zero, along the names that are summed over."""
    left = {name for names in axes.outs for name in names}
    found: dict[Name, Tensor] = {}
    for node, names in axes.operands:
        for name, k in zip(names, nonzero[node][0], strict=True):
            if name is not None and name not in left:
                found[name] = found[name] & k if name in found else k
    return found


def something(kept: Tensor) -> Tensor:
    """`kept`, or the first index where nothing is."""
    return kept if kept.any() else torch.arange(len(kept)) == 0


def completed(axes: Axes, found: dict[Name, Tensor]) -> dict[Name, Tensor]:
    """`found`, and what an operation needs in any case."""
    found = {name: something(k | (name in axes.whole) | axes.needed.get(name, False)) for name, k in found.items()}
    grouped = [name for name in axes.grouped if name in found]
    if grouped:
        found.update(zip(grouped, levelled([found[name] for name in grouped], axes.groups), strict=True))
    return found


def named(names: Sequence[Name | None], found: Mapping[Name, Tensor], own: Kept) -> Kept:
    """What is kept along dimensions of these names; all along those without."""
    return tuple(k | True if n is None else found[n] for n, k in zip(names, own, strict=True))

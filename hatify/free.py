"""What a network leaves free: the dimensions and numbers in its graphs that are other ones at other sizes of inputs.

What is concluded holds for sizes that were seen to be free, and for the example's where none was: those are checked at
every call, since an input of another size might find what was concluded wrong.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from hatify.answers import asks
from hatify.errors import HatError

#: Of each tensor in an input: the (dimension, size) that are fixed; dimensions count from the last, -1.
FixedSizes = tuple[tuple[tuple[int, int], ...], ...]


def check_sizes(value: Any, name: str, fixed: FixedSizes) -> None:
    """Raise a `HatError` where an input has another size than the example's along a dimension that counts as fixed."""
    tensors = (value,) if isinstance(value, Tensor) else [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    for tensor, sizes in zip(tensors, fixed, strict=False):
        for dim, size in sizes:
            if tensor.ndim >= -dim and tensor.shape[dim] != size:
                raise HatError(
                    f"{name} has {tensor.shape[dim]} along dimension {dim}, where the network was converted with "
                    f"{size} and was not seen to take another size: convert it with example inputs of this one"
                )


class Free:
    """Dimensions of outputs, and numbers, that differed between the runs that were seen."""

    def __init__(self) -> None:
        self._first: dict[fx.Node, Any] = {}
        self._differing: set[fx.Node] = set()
        self._dims: dict[fx.Node, set[int]] = {}
        #: Of each input: the shape of each tensor in it, and its dimensions that are free.
        self._inputs: dict[str, list[tuple[torch.Size, set[int]]]] = {}

    def learn(self, seen: dict[fx.Node, Any]) -> None:
        """Compare what nodes made in a run (shapes of tensors, and numbers) with what they made before."""
        for node, value in seen.items():
            first = self._first.setdefault(node, value)
            if value == first:
                continue
            self._differing.add(node)
            pairs = [(first, value)] if isinstance(value, torch.Size) else _pairs(first, value)
            for then, now in pairs:
                alike = len(then) == len(now)
                dims = {d for d, n in enumerate(now) if not alike or n != then[d]}
                self._dims.setdefault(node, set()).update(dims)

    def learn_inputs(self, inputs: dict[str, Any]) -> None:
        """Likewise, of the network's inputs by name."""
        for name, value in inputs.items():
            shapes = [t.shape for t in tree_leaves(value) if isinstance(t, Tensor)]
            known = self._inputs.setdefault(name, [(shape, set()) for shape in shapes])
            for (first, free), shape in zip(known, shapes, strict=True):
                free |= {d for d, n in enumerate(shape) if n != first[d]}

    def fixed(self) -> dict[str, FixedSizes]:
        """The sizes of each input that were not seen to be free."""
        found = {}
        for name, tensors in self._inputs.items():
            fixed = [tuple((d - len(s), n) for d, n in enumerate(s) if d not in free) for s, free in tensors]
            if any(fixed):
                found[name] = tuple(fixed)
        return found

    def dims(self, node: object) -> set[int]:
        """The dimensions of the output of `node`, or of any tensor in it, whose size is free."""
        return self._dims.get(node, set()) if isinstance(node, fx.Node) else set()

    def follows(self, node: fx.Node) -> bool:
        """Whether `node`, which is no feature, is computed from a size that is free."""
        waiting, seen = [node], set()
        while waiting:
            current = waiting.pop()
            if current in self._differing:
                return True
            if current not in seen and not _is_size(current):
                seen.add(current)
                waiting.extend(current.all_input_nodes)
        return False


def _pairs(first: Any, value: Any) -> list[tuple[torch.Size, torch.Size]]:
    """The shapes of what lies at one place in two containers; those of more or fewer tensors belong to none."""
    if not isinstance(first, tuple) or not isinstance(value, tuple):
        return []
    return [(first[i] if i < len(first) else torch.Size(), shape) for i, shape in enumerate(value)]


def _is_size(node: fx.Node) -> bool:
    """Whether `node` asks for a size, or takes one out of a shape."""
    taken = node.target is operator.getitem and isinstance(node.args[0], fx.Node) and asks(node.args[0])
    return asks(node) or taken


class Watching(fx.Interpreter):
    """Runs a graph, and notes the shapes and numbers that its nodes make."""

    def __init__(self, net: torch.nn.Module, graph: fx.Graph) -> None:
        super().__init__(net, graph=graph)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.seen[n] = out.shape
        elif isinstance(out, (int, float, torch.Size)):
            self.seen[n] = out
        elif isinstance(out, (tuple, list)):
            self.seen[n] = tuple(t.shape for t in out if isinstance(t, Tensor))
        return out

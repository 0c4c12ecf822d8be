"""What a network leaves free: the dimensions and numbers in its graphs that are other ones at other sizes of inputs."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from hatify.answers import asks


class Free:
    """Dimensions of outputs, and numbers, that differed between the runs that were seen."""

    def __init__(self) -> None:
        self._first: dict[fx.Node, Any] = {}
        self._differing: set[fx.Node] = set()
        self._dims: dict[fx.Node, set[int]] = {}

    def learn(self, seen: dict[fx.Node, Any]) -> None:
        """Compare what nodes made in a run (shapes of tensors, and numbers) with what they made before."""
        for node, value in seen.items():
            first = self._first.setdefault(node, value)
            if value == first:
                continue
            self._differing.add(node)
            if isinstance(value, torch.Size) and isinstance(first, torch.Size):
                alike = len(value) == len(first)
                dims = {d for d, n in enumerate(value) if not alike or n != first[d]}
                self._dims.setdefault(node, set()).update(dims)

    def dims(self, node: object) -> set[int]:
        """The dimensions of the output of `node` whose size is free."""
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
        return out

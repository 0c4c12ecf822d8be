"""A plain network while it is being written: its graph, and what it holds by name."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.part import TAKEN

#: What does nothing but read, and can go if nobody reads its result.
_READING = (getattr, operator.getitem, "size", "dim")

#: What is known of a node, by key of its ``meta``.
#: ``mask``: where its output may be non-zero, bool, as it broadcasts to that. ``dtype`` and ``ndim``: of its output.
MASK, DTYPE, NDIM = "mask", "dtype", "ndim"


class Plain:
    """The graph of a network, and the modules, parameters and buffers that it holds, by name.

    Args:
        like: a graph that is called in the same way.
    """

    def __init__(self, like: fx.Graph) -> None:
        self.graph = fx.Graph()
        self.graph._codegen = copy.deepcopy(like._codegen)
        self.root: dict[str, Any] = {}
        self._tied: dict[int, list[nn.Parameter]] = {}
        self._sources: list[Tensor] = []

    def get(self, name: str, value: Tensor) -> fx.Node:
        """A node that reads a parameter or buffer, which is stored under `name` if that is free."""
        return self.graph.create_node("get_attr", self.store(name, value))

    def store(self, name: str, value: Any) -> str:
        """Keep a module, parameter or buffer under `name`, or under a similar one where that is taken."""
        first, dot, rest = name.partition(".")
        name = f"{first}_{dot}{rest}" if first in TAKEN else name
        if any(name.startswith(f"{path}.") for path, held in self.root.items() if isinstance(held, nn.Module)):
            name = name.replace(".", "_")
        free, number = name, 1
        while self._is_taken(free, value):
            number += 1
            free = f"{name}_{number}"
        self.root[free] = value
        return free

    def _is_taken(self, name: str, value: Any) -> bool:
        inside = isinstance(value, nn.Module) and any(path.startswith(f"{name}.") for path in self.root)
        return inside or self.root.get(name, value) is not value

    def parameter(self, source: Tensor, value: Tensor) -> nn.Parameter:
        """`value` as a parameter: one and the same for equal parts of one `source`, so that ties hold."""
        known = self._tied.setdefault(id(source), [])
        self._sources.append(source)
        for parameter in known:
            if torch.equal(parameter, value):
                return parameter
        known.append(value if isinstance(value, nn.Parameter) else nn.Parameter(value.clone(), source.requires_grad))
        return known[-1]

    def module(self, name: str) -> fx.GraphModule:
        """The network, in evaluation mode."""
        for node in reversed(self.graph.nodes):
            if not node.users and (node.op == "get_attr" or node.target in _READING):
                self.graph.erase_node(node)
        return fx.GraphModule(self.root, self.graph, class_name=name).eval()

"""Run a graph one node at a time, to look at what each makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves


class Stepwise(fx.Interpreter):
    """Runs the nodes of a graph one at a time; `env` holds what they have made.

    Args:
        net: what the graph's modules, parameters and buffers are looked up in.
        graph: the graph.
        inputs: those of the graph, in order.
    """

    def __init__(self, net: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> None:
        super().__init__(net, graph=graph)
        self.args_iter = iter(inputs)

    def step(self, node: fx.Node) -> Any:
        """Run `node`."""
        self.env[node] = self.run_node(node)
        return self.env[node]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, in order."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]

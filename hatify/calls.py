"""What tracing notes of the calls of modules, for the blocks of the original to be found again in a flat graph."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

#: The key of ``node.meta`` under which tracing notes the calls that a node was recorded in, the outermost first.
CALLS = "hatify_calls"
#: The same for the names of methods of the network (``forward_features``) that have returned the node.
RETURNED = "hatify_returned_by"


class Call:
    """One call of a module while a network is traced.

    Attributes:
        path: the module's.
        arguments: nodes, numbers and containers of these, by the names that ``forward`` gives them.
        result: what it returned, likewise.
    """

    def __init__(self, path: str, arguments: dict[str, Any]) -> None:
        self.path, self.arguments = path, arguments
        self.result: Any = None

    @classmethod
    def of(cls, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call ``module(*args, **kwargs)``."""
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        except (TypeError, ValueError):
            bound = {}
        return cls(path, {name: _nodes(value) for name, value in bound.items()})

    def returns(self, result: Any) -> None:
        """Note what the call has returned."""
        self.result = _nodes(result)


def _nodes(value: Any) -> Any:
    """`value` with nodes in the place of proxies."""
    return map_aggregate(value, lambda a: a.node if isinstance(a, fx.Proxy) else a)

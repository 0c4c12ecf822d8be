"""Where a zero does harm: divisors, and the arguments of functions that are infinite, or infinitely steep, at zero.

A mask behind ``1 + x.abs()`` would make ``x / (1 + x.abs())`` divide by zero for every feature that is off. Values that
reach such an operand through elementwise operations and data movement alone are therefore never masked.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx, nn

from hatify.answers import asks
from hatify.ops import Operation, Trait, operation_of

_PASSING = (Trait.ELEMENTWISE, Trait.MOVES)


def endangered(net: nn.Module, graph: fx.Graph, modules: Container[str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes of `graph` whose values must not be made zero, and those where masks must hold against infinities.

    `modules` are those with a policy of their own. Their masks cannot be left out, so what comes back to an off
    feature, and may be infinite, has to be stopped there, also where the singularity is reached through a statistic.
    """
    singular = {node: _operands(node) for node in graph.nodes}
    operands = [operand for found in singular.values() for operand in found]
    never_masked, _ = _reach(net, operands, modules, _PASSING)
    around = [source for node, found in singular.items() if found for source in node.all_input_nodes]
    passed, origins = _reach(net, around, modules, (*_PASSING, Trait.STATISTIC))
    return never_masked, passed | origins | {node for node, found in singular.items() if found}


def _reach(
    net: nn.Module, start: list[Any], modules: Container[str], through: tuple[Trait, ...]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes passed on the way back from `start` through operations of some kinds, and those where the way ends."""
    passed: set[fx.Node] = set()
    ends: set[fx.Node] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        # A divisor may be the size of a value: that value is none.
        if not isinstance(node, fx.Node) or node in passed or node in ends or asks(node):
            continue
        known = _operation(net, node, modules)
        if known is not None and not known.traits.isdisjoint(through):
            passed.add(node)
            waiting.extend(node.all_input_nodes)
        else:
            ends.add(node)
    return passed, ends


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """The operands of `node` at which it is singular."""
    known = operation_of(node)
    return () if known is None or known.singular is None else tuple(known.singular(node))


def _operation(net: nn.Module, node: fx.Node, modules: Container[str]) -> Operation | None:
    """What is known of the operation at `node`, which has no policy of its own."""
    if node.op != "call_module":
        return operation_of(node)
    return None if node.target in modules else operation_of(node, net.get_submodule(str(node.target)))

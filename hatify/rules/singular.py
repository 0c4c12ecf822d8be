"""Where a zero does harm: divisors, and the arguments of functions that are infinite, or infinitely steep, at zero.

A mask behind ``1 + x.abs()`` would make ``x / (1 + x.abs())`` divide by zero for every feature that is off. Values that
reach such an operand through elementwise operations and data movement alone are therefore never masked.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx, nn

from hatify.rules.registry import RULES

_DIVISIONS = {"div", "div_", "truediv", "true_divide", "floordiv", "remainder", "fmod"}
_SINGULAR_AT_ZERO = {"log", "log2", "log10", "rsqrt", "reciprocal", "sqrt"}
_POWERS = {"pow", "pow_"}
_TRANSPARENT = ("hatify.rules.pointwise", "hatify.rules.movement")


def endangered(net: nn.Module, graph: fx.Graph, modules: Container[str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes of `graph` whose values must not be made zero, and those of modules whose zeros meet a singularity.

    `modules` are those with a policy of their own. Their masks cannot be left out, so gradients that come back to an
    off feature, and may be infinite, have to be stopped there.
    """
    never_masked: set[fx.Node] = set()
    steep: set[fx.Node] = set()
    waiting: list[Any] = [operand for node in graph.nodes for operand in _operands(node)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in never_masked:
            continue
        if not _is_transparent(net, node, modules):
            steep.add(node)
            continue
        never_masked.add(node)
        waiting.extend(node.all_input_nodes)
    return never_masked, steep


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """The operands of `node` at which it is singular."""
    if node.op not in ("call_function", "call_method"):
        return ()
    name = str(getattr(node.target, "__name__", node.target))
    if name in _DIVISIONS:
        return node.args[1:2] or (node.kwargs.get("other"),)
    if name in _SINGULAR_AT_ZERO:
        return node.args[:1] or (node.kwargs.get("input"),)
    if name in _POWERS and len(node.args) > 1:
        exponent = node.args[1]
        harmless = isinstance(exponent, (int, float)) and (exponent >= 1 or exponent == 0)
        return () if harmless else node.args[:1]
    return ()


def _is_transparent(net: nn.Module, node: fx.Node, modules: Container[str]) -> bool:
    if node.op == "call_module":
        target: Any = None if node.target in modules else type(net.get_submodule(str(node.target)))
    else:
        target = node.target
    rule = RULES.get(target)
    return rule is not None and rule.__module__ in _TRANSPARENT

"""Where a zero does harm: divisors, and the arguments of functions that are infinite, or infinitely steep, at zero.

A mask behind ``1 + x.abs()`` would make ``x / (1 + x.abs())`` divide by zero for every feature that is off. Values that
reach such an operand through elementwise operations and data movement alone are therefore never masked.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx, nn

from hatify.answers import asks
from hatify.rules.registry import RULES

_DIVISIONS = {"div", "div_", "truediv", "true_divide", "floordiv", "remainder", "fmod"}
_SINGULAR_AT_ZERO = {
    "log", "log2", "log10", "rsqrt", "reciprocal", "sqrt", "logit", "special_logit", "special_entr", "entr", "lgamma",
    "digamma",
}  # fmt: skip
_SINGULAR_IN_BOTH = {"hypot", "xlogy", "special_xlogy", "kl_div"}
_POWERS = {"pow", "pow_", "float_power"}
_ELEMENTWISE = ("hatify.rules.pointwise", "hatify.rules.movement")
_STATISTICS = ("hatify.rules.reduction",)


def endangered(net: nn.Module, graph: fx.Graph, modules: Container[str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes of `graph` whose values must not be made zero, and those where masks must hold against infinities.

    `modules` are those with a policy of their own. Their masks cannot be left out, so what comes back to an off
    feature, and may be infinite, has to be stopped there, also where the singularity is reached through a statistic.
    """
    singular = {node: _operands(node) for node in graph.nodes}
    operands = [operand for found in singular.values() for operand in found]
    never_masked, _ = _reach(net, operands, modules, _ELEMENTWISE)
    around = [source for node, found in singular.items() if found for source in node.all_input_nodes]
    passed, origins = _reach(net, around, modules, (*_ELEMENTWISE, *_STATISTICS))
    return never_masked, passed | origins | {node for node, found in singular.items() if found}


def _reach(
    net: nn.Module, start: list[Any], modules: Container[str], through: tuple[str, ...]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes passed on the way back from `start` through operations of some families, and those where the way ends."""
    passed: set[fx.Node] = set()
    ends: set[fx.Node] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        # A divisor may be the size of a value: that value is none.
        if not isinstance(node, fx.Node) or node in passed or node in ends or asks(node):
            continue
        if _family(net, node, modules) in through:
            passed.add(node)
            waiting.extend(node.all_input_nodes)
        else:
            ends.add(node)
    return passed, ends


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """The operands of `node` at which it is singular."""
    if node.op not in ("call_function", "call_method"):
        return ()
    name = str(getattr(node.target, "__name__", node.target))
    if name in _DIVISIONS:
        return node.args[1:2] or (node.kwargs.get("other"),)
    if name == "addcdiv":
        return node.args[2:3] or (node.kwargs.get("tensor2"),)
    if name in _SINGULAR_IN_BOTH:
        return tuple(node.all_input_nodes)
    if name in _SINGULAR_AT_ZERO:
        return node.args[:1] or (node.kwargs.get("input"),)
    if name in _POWERS and len(node.args) > 1:
        exponent = node.args[1]
        harmless = isinstance(exponent, (int, float)) and (exponent >= 1 or exponent == 0)
        return () if harmless else node.args[:1]
    return ()


def _family(net: nn.Module, node: fx.Node, modules: Container[str]) -> str | None:
    """The module that the rule for `node` is defined in; None without a rule."""
    target: Any = node.target
    if node.op == "call_module":
        target = None if target in modules else type(net.get_submodule(str(target)))
    rule = RULES.get(target)
    return None if rule is None else rule.__module__

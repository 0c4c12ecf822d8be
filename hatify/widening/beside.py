"""A network that has grown, run beside the original, node by node: to find what cannot grow, and to rewrite sizes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from hatify.answers import check_argument, check_size
from hatify.errors import HatError
from hatify.free import Free
from hatify.nn.functional import masked, masked_off
from hatify.nn.state import looks_up_mask
from hatify.ops import Trait, operation_of
from hatify.ops.registry import Resizing
from hatify.ops.resize import CannotCut
from hatify.rounding import agree
from hatify.stepwise import Stepwise, tensors_in
from hatify.widening.composed import Axis
from hatify.widening.plotted import Growing
from hatify.widening.relate import WithEverythingOn
from hatify.widening.widened import Written, written


class CannotGrow(Exception):
    """Something computes another thing once these axes have grown, each with the reason."""

    def __init__(self, axes: Iterable[tuple[Axis, str]]) -> None:
        self.axes = list(axes)


def outputs(net: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What a flat graph makes with all masks on, with the same random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors_in(WithEverythingOn(net, graph=graph).run(*inputs))


class Beside:
    """Runs a flat graph and that of the copy side by side.

    Args:
        growing: how the axes of the graph have grown.
        free: what the graph leaves free.
        ours: the network's children, and its graph.
        theirs: those of the copy, whose calls are rewritten.
        inputs: what to run them on.

    Attributes:
        calls: the calls that are written otherwise, by the names of their nodes.
        changed: the same and the places of masks, as nodes of the graph and of that of the copy.
    """

    def __init__(
        self,
        growing: Growing,
        free: Free,
        ours: tuple[nn.Module, fx.Graph],
        theirs: tuple[nn.Module, fx.Graph],
        inputs: tuple[Any, ...],
    ) -> None:
        self.growing, self.free, self.values = growing, free, growing.relations.values
        self.graph, self.wide = ours[1], theirs[1]
        self.runs = [_Stepwise(*ours, inputs), _Stepwise(*theirs, inputs)]
        self.calls: dict[str, Written] = {}
        self.changed: dict[str, tuple[fx.Node, fx.Node]] = {}
        self.twin: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Run both.

        Raises:
            CannotGrow: nodes of the copy make something else, or fail.
        """
        ours, theirs = self.runs
        faults: list[tuple[Axis, str]] = []
        for node, wide in zip(self.graph.nodes, list(self.wide.nodes), strict=True):
            self.twin[wide] = node
            numbers = torch.get_rng_state()
            out = ours.step(node)
            torch.set_rng_state(numbers)
            try:
                self._rewrite(node, wide)
                if node in self.values and not self._agrees(node, out, theirs.step(wide)):
                    faults += self._culprits(node, f"{node.name} would compute something else")
                if node not in self.values:
                    theirs.step(wide)
            except CannotCut:
                faults += self._culprits(node, f"{node.name} mentions sizes that cannot be rewritten")
            except Exception:  # whatever an operation raises that cannot do with such sizes
                faults += self._culprits(node, f"{node.name} cannot be given more")
            if faults and node in self.values and tensors_in(out):
                # What it should have made, to find others like it.
                theirs.env[wide] = self._as_it_should_be(node, out)
            for dead in ours.user_to_last_uses.get(node, ()):
                ours.env.pop(dead, None)
            for dead in theirs.user_to_last_uses.get(wide, ()):
                theirs.env.pop(dead, None)
        if faults:
            raise CannotGrow(faults)

    def _as_it_should_be(self, node: fx.Node, out: Any) -> Any:
        """What the original has made, with zeros where there is more."""
        tensors = iter(zip(tensors_in(out), self.values.get(node, ()), strict=False))

        def enlarged(value: Tensor) -> Tensor:
            for d, axis in enumerate(next(tensors)[1]):
                if (g := self.growing.of(axis)) is not None:
                    shape = [len(g.like) if e == d else n for e, n in enumerate(value.shape)]
                    value = value.new_zeros(shape).index_copy(d, g.place.to(value.device), value)
            return value

        return tree_map_only(Tensor, enlarged, out)

    def _culprits(self, node: fx.Node, why: str) -> list[tuple[Axis, str]]:
        """What grows around a node.

        Raises:
            HatError: nothing does.
        """
        nodes = (node, *node.all_input_nodes)
        axes = [axis for n in nodes for dims in self.values.get(n, ()) for axis in dims]
        if node.op == "call_module":
            axes += self.growing.relations.modules.get(str(node.target), {}).values()
        found = [(axis, why) for axis in axes if self.growing.of(axis) is not None]
        if not found:
            raise HatError(f"widen: {why}, though nothing grows there")
        return found

    def _agrees(self, node: fx.Node, out: Any, found: Any) -> bool:
        """Whether what the copy makes is, without what is new, what the original makes."""
        made, wide = tensors_in(out), tensors_in(found)
        if len(made) != len(wide):
            return False
        operands = [t for n in node.all_input_nodes for t in tensors_in(self.runs[0].env.get(n))]
        for value, other, dims in zip(made, wide, self.values[node], strict=True):
            for d, axis in enumerate(dims):
                if (g := self.growing.of(axis)) is not None:
                    if other.shape[d] != len(g.like):
                        return False
                    other = other.index_select(d, g.place.to(other.device))
            if not agree(other, value, operands):
                return False
        return True

    # Sizes -----------------------------------------------------------------------------------------------------------

    def _rewrite(self, node: fx.Node, wide: fx.Node) -> None:
        """Let the copy's call mention the sizes that there are now."""
        if node.op not in ("call_function", "call_method") or looks_up_mask(node):
            return
        before = wide.target, wide.args, wide.kwargs
        if node.target in (check_size, check_argument):
            self._rewrite_check(node, wide)
        elif node.target in (masked, masked_off):
            self._rewrite_mask(node, wide)
        else:
            wide.args, wide.kwargs = map_arg((wide.args, wide.kwargs), self._as_it_was)
            self._rewrite_shape(node, wide)
            self._resize(node, wide)
        if before == (wide.target, wide.args, wide.kwargs):
            return
        self.changed[node.name] = node, wide
        if node.target not in (masked, masked_off):
            products = {w: str(w.args[0]) for w in self.twin if w.target in (masked, masked_off)}
            target = None if wide.target == node.target else wide.target.__name__  # type: ignore[union-attr]
            self.calls[node.name] = target, written(wide.args, products), written(wide.kwargs, products)

    def _as_it_was(self, operand: fx.Node) -> Any:
        """A number that follows from sizes of the network counts as it was."""
        then, now = (run.env.get(n) for run, n in zip(self.runs, (self.twin[operand], operand), strict=True))
        is_number = isinstance(then, (int, float)) and not isinstance(then, bool)
        return then if is_number and then != now and not self.free.follows(self.twin[operand]) else operand

    def _rewrite_check(self, node: fx.Node, wide: fx.Node) -> None:
        found = wide.args[0]
        if isinstance(found, fx.Node):
            then, now = (run.env.get(n) for run, n in zip(self.runs, (node.args[0], found), strict=True))  # type: ignore[arg-type]
            if then != now:
                wide.args = (found, tuple(now) if isinstance(now, tuple) else now, *wide.args[2:])

    def _rewrite_mask(self, node: fx.Node, wide: fx.Node) -> None:
        view = node.args[2]
        if isinstance(view, tuple):
            wide.args = (*wide.args[:2], self.growing.view(node, view))  # type: ignore[arg-type]

    def _rewrite_shape(self, node: fx.Node, wide: fx.Node) -> None:
        """A shape that is put together for one reshape, as ``x.size()[:-1] + (8,)``, ends in sizes of its output."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        last = node.args[-1] if node.target is operator.add else None
        if user is not None and isinstance(last, tuple) and user.args[1:] == (node,) and len(self.values[user]) == 1:
            (dims,) = self.values[user]
            wide.args = (wide.args[0], tuple(map(self.growing.size, dims[len(dims) - len(last) :])))

    def _resize(self, node: fx.Node, wide: fx.Node) -> None:
        known = operation_of(node)
        if known is None or known.resize is None or Trait.FACTORY in known.traits or not node.args:
            return
        outs = [self._counts(dims) for dims in self.values[node]]
        first = node.args[0]
        source = self._counts(self.values[first][0]) if isinstance(first, fx.Node) and self.values.get(first) else ()
        if not any(bool((c != 1).any()) for dims in (source, *outs) for c in dims):
            return
        if len(wide.args) == 2 and self._is_shape(wide.args[1], self.values[node]):
            return
        out = outs[0] if isinstance(self.runs[0].env.get(node), Tensor) else outs
        target, args, kwargs = known.resize(Resizing(wide, wide.args, wide.kwargs, source, out))
        wide.op = "call_method" if isinstance(target, str) else "call_function"
        wide.target, wide.args, wide.kwargs = target, args, kwargs

    def _is_shape(self, argument: Any, made: list[list[Axis]]) -> bool:
        """Whether an argument is the shape of what is going to be made, as it is now."""
        value = self.runs[1].env.get(argument) if isinstance(argument, fx.Node) else None
        return isinstance(value, tuple) and [*value] == [self.growing.size(axis) for dims in made for axis in dims]

    def _counts(self, dims: list[Axis]) -> tuple[Tensor, ...]:
        return tuple(
            torch.ones(axis.size, dtype=torch.int64) if (g := self.growing.of(axis)) is None else g.counts
            for axis in dims
        )


class _Stepwise(WithEverythingOn, Stepwise):
    """One node at a time."""

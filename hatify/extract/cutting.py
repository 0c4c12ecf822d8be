"""Take what a task has off out of its baked network, in one pass.

What may be non-zero is known of every value (`Zeros`). First, from the outputs back, each operation asks for what it
needs of its operands; nobody asks for what is zero, unless a reshape or the groups of a convolution need a grid. Then
the network is written anew, node by node: layers are sliced, operands that have lost different indices are aligned, and
where an operation cannot do without what is gone, zeros are put back ahead of it, and taken out again behind it. Each
node is run as it is written, beside its original, at every size there is to try.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hatify.answers import asks
from hatify.axes import Axes, Kept, Moves, Name, everything
from hatify.extract.baking import known_number
from hatify.extract.plain import DTYPE, MASK, NDIM, Plain
from hatify.extract.slicing import cut_along, sliced
from hatify.extract.wanted import KeptOf, by_name, completed, named, needed, summed
from hatify.extract.zeros import Zeros
from hatify.free import Free
from hatify.ops import operation_of
from hatify.ops.registry import Resizing, Rewritten
from hatify.ops.resize import CannotCut, is_cut
from hatify.rounding import agree
from hatify.stepwise import Stepwise, tensors_in
from hatify.support import positional


def cut(baked: Plain, sizes: Sequence[Any], free: Free) -> Plain:
    """The network without what is zero.

    Args:
        baked: the network at full size, on the CPU.
        sizes: inputs to try it on, the example's first.
        free: the sizes that it leaves free.

    Raises:
        CannotCut: an operation does not compute what it did, even with all zeros put back; names it.
    """
    net = baked.module("Baked")
    zeros = Zeros(net, baked.graph, free)
    zeros.run(*positional(baked.graph, sizes[0]))
    return _Writer(net, zeros, needed(zeros), sizes).write()


class _OfRoot(Stepwise):
    """Runs a graph whose modules, parameters and buffers are in a dictionary."""

    def __init__(self, graph: fx.Graph, inputs: tuple[Any, ...], root: dict[str, Any]) -> None:
        super().__init__(nn.Module(), graph, inputs)
        self.root = root

    def fetch_attr(self, target: str) -> Any:
        return self.root[target]


class _Writer:
    """Writes the smaller network, node by node."""

    def __init__(self, net: fx.GraphModule, zeros: Zeros, wanted: KeptOf, sizes: Sequence[Any]) -> None:
        self.net, self.zeros, self.wanted = net, zeros, wanted
        self.plain = Plain(zeros.graph)
        inputs = [positional(zeros.graph, given) for given in sizes]
        self.originals = [Stepwise(net, zeros.graph, given) for given in inputs]
        self.runs: list[Stepwise] = [_OfRoot(self.plain.graph, given, self.plain.root) for given in inputs]
        #: What each node has become (a node of the new graph, or a constant), and what is kept of what it makes.
        self.values: dict[fx.Node, Any] = {}
        self.kept: KeptOf = {}
        #: Of each node, the new nodes that are run for its sake; and of each new node, for whose.
        self.held: dict[fx.Node, set[fx.Node]] = {}
        self.holders: dict[fx.Node, set[fx.Node]] = {}
        self.aligned: dict[tuple[fx.Node, bytes], fx.Node] = {}
        self.modules: dict[tuple[str, bytes], nn.Module] = {}

    @torch.no_grad()
    def write(self) -> Plain:
        """The network.

        Raises:
            CannotCut: a node does not compute what it did.
        """
        for node in self.zeros.graph.nodes:
            expected = [run.step(node) for run in self.originals]
            before = len(self.plain.graph.nodes)
            self._write(node, expected)
            self._forget(node, before)
        return self.plain

    def _write(self, node: fx.Node, expected: list[Any]) -> None:
        before = set(self.plain.graph.nodes)
        for way in (self._cut, self._densely):
            try:
                self.values[node], self.kept[node] = way(node)
                if self._agrees(node, expected):
                    return
            except CannotCut:
                pass
            self._erase(before)
        raise CannotCut(node.name)

    # Bookkeeping -----------------------------------------------------------------------------------------------------

    def _put(self, op: str, target: Any, args: Any, kwargs: Any = None, name: str | None = None) -> fx.Node:
        """A new node, which is run at once."""
        node = self.plain.graph.create_node(op, target, args, kwargs or {}, name)
        for run in self.runs:
            try:
                value = run.step(node)
            except Exception as error:  # whatever an operation raises that cannot do without what is gone
                raise CannotCut from error
        if isinstance(value, Tensor):
            node.meta.update({DTYPE: value.dtype, NDIM: value.ndim})
        return node

    def _erase(self, before: set[fx.Node]) -> None:
        """Take back what was written after the nodes that were there `before`."""
        for node in reversed(self.plain.graph.nodes):
            if node not in before:
                self.plain.graph.erase_node(node)
                for run in self.runs:
                    run.env.pop(node, None)
        self.aligned = {key: node for key, node in self.aligned.items() if node in before}

    def _forget(self, node: fx.Node, before: int) -> None:
        """Free the values that nobody is going to read, after `node` was written behind `before` others."""
        count = len(self.plain.graph.nodes) - before
        held = self.held.setdefault(node, set(islice(reversed(self.plain.graph.nodes), count)))
        fx.node.map_arg(self.values[node], held.add)
        for (source, _), new in self.aligned.items():
            self.held[source].add(new)
            self.holders.setdefault(new, set()).add(source)
        for new in held:
            self.holders.setdefault(new, set()).add(node)
        for dead in self.originals[0].user_to_last_uses.get(node, ()):
            for new in self.held.pop(dead, ()):
                self.holders[new].discard(dead)
                if not self.holders[new]:
                    for run in self.runs:
                        run.env.pop(new, None)
            for run in self.originals:
                run.env.pop(dead, None)
        self.aligned = {key: new for key, new in self.aligned.items() if key[0] in self.held}

    def _agrees(self, node: fx.Node, expected: list[Any]) -> bool:
        """Whether what has become of `node` is, of what it makes, what is kept."""
        value = self.values[node]
        if node.op in ("placeholder", "get_attr", "output") or not isinstance(value, fx.Node):
            return True
        for run, original, whole in zip(self.runs, self.originals, expected, strict=True):
            given = [t for n in node.all_input_nodes for t in tensors_in(original.env.get(n))]
            found, wholes, kept = tensors_in(run.env[value]), tensors_in(whole), self.kept[node]
            # At other sizes there may be more pieces, of which nothing is cut.
            parts = [cut_along(full, kept[i]) if i < len(kept) else full for i, full in enumerate(wholes)]
            if len(found) != len(parts) or not all(agree(*pair, given) for pair in zip(found, parts, strict=True)):
                return False
        return True

    # The two ways ----------------------------------------------------------------------------------------------------

    def _cut(self, node: fx.Node) -> tuple[Any, list[Kept]]:
        """Write `node` for operands of which indices are gone."""
        axes = self.zeros.axes.get(node)
        if node.op == "placeholder":
            return self._put("placeholder", node.target, node.args, name=node.name), self.zeros.nonzero[node]
        if node.op == "get_attr":
            return None, self._all_of(node)
        if asks(node):
            return self._asked(node), []
        if node in self.zeros.items:
            source: Any = node.args[0]
            taken = self._put("call_function", operator.getitem, (self.values[source], node.args[1]), name=node.name)
            return taken, [self.kept[source][place] for place in self.zeros.items[node]]
        if isinstance(axes, Axes):
            return self._by_name(node, axes)
        if isinstance(axes, Moves):
            return self._moved(node, axes)
        return self._densely(node)

    def _densely(self, node: fx.Node) -> tuple[Any, list[Kept]]:
        """Write `node` for operands to which the zeros were given back, and take them out behind it."""
        operands = {n: self._align(n, self._all_of(n)) for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
        if known := known_number(node, args, kwargs):
            return known[0], []
        if node.op == "output":
            return self._put("output", node.target, args, kwargs), self.zeros.nonzero[node]
        whole = self._all_of(node)
        written = self._called(node, args, kwargs, (), [])
        if not self._is_one(node):
            return written, whole
        return self._aligned(written, whole[0], self.wanted[node][0]), self.wanted[node]

    def _all_of(self, node: fx.Node) -> list[Kept]:
        return [everything([len(k) for k in kept]) for kept in self.zeros.nonzero[node]]

    def _is_one(self, node: fx.Node) -> bool:
        """Whether a node makes a tensor, and no container of these."""
        return isinstance(self.originals[0].env.get(node), Tensor)

    def _asked(self, node: fx.Node) -> Any:
        """A size that was cut counts as it was wherever it is used as a number."""
        source: Any = node.args[0]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._whole_or_cut)
        dims = self.kept[source][0] if self._is_one(source) else ()
        if not any(map(is_cut, dims)):
            return self._put(node.op, node.target, args, kwargs, node.name)
        question: Any = node.args[1] if node.target is getattr else node.target
        if question in ("numel", "nelement"):
            raise CannotCut
        if question not in ("shape", "size"):
            return self._put(node.op, node.target, args, kwargs, node.name)
        if question == "size" and (args[1:] or kwargs):
            dim: Any = args[1] if args[1:] else kwargs["dim"]
            axis = dims[dim]
            return len(axis) if is_cut(axis) else self._put(node.op, node.target, args, kwargs, node.name)
        shape = self._put(node.op, node.target, args, kwargs, node.name)
        return tuple(
            len(axis) if is_cut(axis) else self._put("call_function", operator.getitem, (shape, d))
            for d, axis in enumerate(dims)
        )

    def _whole_or_cut(self, node: fx.Node) -> Any:
        return self._align(node, self.kept[node])

    # By name ---------------------------------------------------------------------------------------------------------

    def _by_name(self, node: fx.Node, axes: Axes) -> tuple[Any, list[Kept]]:
        found = self._found(node, axes)
        operands = {n: self._whole_or_cut(n) for n in node.all_input_nodes if n not in dict(axes.operands)}
        for operand, names in axes.operands:
            operands[operand] = self._align(operand, [named(names, found, self.kept[operand][0])])
        made = self.zeros.nonzero[node]
        kept = [named(names, found, own) for names, own in zip(axes.outs, made, strict=True)]
        mask = node.meta.get(MASK)
        if mask is not None and node.op == "call_function" and bool(cut_along(mask, kept[0]).all()):
            x: Any = node.args[0] if node.target is operator.mul else node.args[-1]
            return operands[x], kept
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
        if node.op == "call_module":
            name = self.plain.store(str(node.target), self._module(str(node.target), found, made[0]))
            return self._put("call_module", name, args, kwargs, node.name), kept
        first, names = axes.operands[0]
        source = named(names, found, self.kept[first][0])
        return self._called(node, args, kwargs, source, kept[0]), kept

    def _found(self, node: fx.Node, axes: Axes) -> dict[Name, Tensor]:
        """What is kept along each name: what is wanted, or what an operand has left, whichever moves the least."""
        wanted = by_name(axes.outs, self.wanted[node]) | summed(axes, self.zeros.nonzero)
        along: dict[Name, list[tuple[int, Tensor, Tensor]]] = {}
        for operand, names in axes.operands:
            if operand.op != "get_attr":
                size = self.originals[0].env[operand].numel()
                for name, k, nonzero in zip(names, self.kept[operand][0], self.zeros.nonzero[operand][0], strict=True):
                    if name is not None:
                        along.setdefault(name, []).append((size, k, nonzero))
        found = completed(axes, {name: _cheapest(kept, along.get(name, ())) for name, kept in wanted.items()})
        return {name: torch.ones_like(kept) if name in axes.filled else kept for name, kept in found.items()}

    def _module(self, path: str, found: Mapping[Name, Tensor], out: Kept) -> nn.Module:
        """The module at `path` without the features that go."""
        names = sorted(found, key=str)
        key = (path, b"".join(str(name).encode() + found[name].numpy().tobytes() for name in names))
        if key not in self.modules:
            module = self.net.get_submodule(path)
            self.modules[key] = (
                sliced(module, found, len(out), self.plain) if any(map(is_cut, found.values())) else module
            )
        return self.modules[key]

    # Movements -------------------------------------------------------------------------------------------------------

    def _moved(self, node: fx.Node, moves: Moves) -> tuple[Any, list[Kept]]:
        """As the sources are, if the operation can do with that; else with what it needs of them alone."""
        wanted = self.wanted[node]
        asked = [moves.asked(s, wanted, [len(k) for k in self.kept[s.node][0]]) for s in moves.sources]
        left = [self.kept[s.node][0] for s in moves.sources]
        before = set(self.plain.graph.nodes)
        for kept in (left, asked):
            try:
                return self._moved_of(node, moves, kept, wanted)
            except CannotCut:
                self._erase(before)
        raise CannotCut

    def _moved_of(
        self, node: fx.Node, moves: Moves, sources: list[Kept], wanted: list[Kept]
    ) -> tuple[fx.Node, list[Kept]]:
        if any(is_cut(k) for kept in sources for d, k in enumerate(kept) if d in moves.loose):
            raise CannotCut
        kept_of = {source.node: [kept] for source, kept in zip(moves.sources, sources, strict=True)}
        kept_of |= {n: self.kept[n] for n in moves.by_shape}
        operands = {n: self._align(n, kept_of.get(n, self._all_of(n))) for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
        out = moves.arriving(sources, wanted)
        if not all(k.any() for kept in out for k in kept):
            raise CannotCut
        shape = out[0] if self._is_one(node) else out
        written = self._called(node, args, kwargs, sources[0], shape)
        for run, original in zip(self.runs, self.originals, strict=True):
            made, wholes = tensors_in(run.env[written]), tensors_in(original.env[node])
            # At other sizes there may be more of them.
            expected = [cut_along(full, kept).shape for full, kept in zip(wholes, out, strict=False)]
            if len(wholes) != len(out) or [t.shape for t in made] != expected:
                raise CannotCut
        return written, list(out)

    def _called(self, node: fx.Node, args: Any, kwargs: Any, source: Kept, out: Any) -> fx.Node:
        """A module as it is; or a function or method, told of what is left of its first operand and its output."""
        if node.op == "call_module":
            path = str(node.target)
            path = self.plain.store(path, self.net.get_submodule(path))
            return self._put("call_module", path, args, kwargs, node.name)
        known = operation_of(node)
        call: Rewritten = (node.target, args, kwargs)
        if known is not None and known.resize is not None:
            kept = [source, *(out if out and isinstance(out[0], (tuple, list)) else [out])]
            if any(is_cut(k) for dims in kept for k in dims):
                call = known.resize(Resizing(node, args, kwargs, source, out))
        op = "call_method" if isinstance(call[0], str) else "call_function"
        return self._put(op, *call, node.name)

    # Alignment -------------------------------------------------------------------------------------------------------

    def _align(self, node: fx.Node, kept: list[Kept]) -> Any:
        """What `node` has become, with just what is `kept` of it; zeros where that is gone already."""
        if node.op == "get_attr":
            return self._constant(node, kept[0])
        value, left = self.values[node], self.kept[node]
        if all(torch.equal(a, b) for dims, own in zip(kept, left, strict=True) for a, b in zip(dims, own, strict=True)):
            return value
        if not self._is_one(node):
            raise CannotCut
        key = (node, b"".join(k.numpy().tobytes() for k in kept[0]))
        if key not in self.aligned:
            self.aligned[key] = self._aligned(value, left[0], kept[0])
        return self.aligned[key]

    def _aligned(self, value: fx.Node, left: Kept, kept: Kept) -> fx.Node:
        for d, (now, then) in enumerate(zip(left, kept, strict=True)):
            if torch.equal(now, then):
                continue
            there, count = now[then], int(now.sum())
            place = torch.where(there, (now.cumsum(0) - 1)[then], count)
            first = int(place[0])
            if torch.equal(place, torch.arange(first, first + len(place))) and there.all():
                value = self._put("call_function", torch.narrow, (value, d, first, len(place)))
                continue
            if not there.all():
                behind = len(left) - 1 - d
                value = self._put("call_function", F.pad, (value, (0, 0) * behind + (0, 1)))
            index = self._put("get_attr", self.plain.store("kept", place), ())
            value = self._put("call_function", torch.index_select, (value, d, index))
        return value

    def _constant(self, node: fx.Node, kept: Kept) -> fx.Node:
        name = str(node.target)
        whole = self.net.get_parameter(name) if name in dict(self.net.named_parameters()) else self.net.get_buffer(name)
        value = cut_along(whole.detach(), kept)
        held = self.plain.parameter(whole, value) if isinstance(whole, nn.Parameter) else value
        return self._put("get_attr", self.plain.store(name, held), ())


def _cheapest(wanted: Tensor, operands: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """What to keep of several operands along a dimension, so that as little as possible has to be moved.

    Args:
        wanted: what has to be kept.
        operands: of each, its size, what it has left, and where it may be non-zero. It may be given zeros.
    """

    def cost(kept: Tensor) -> tuple[int, int]:
        return sum(size for size, left, _ in operands if not torch.equal(left, kept)), int(kept.sum())

    def is_possible(kept: Tensor) -> bool:
        return bool((kept | ~wanted).all()) and not any(
            bool((kept & ~left & nonzero).any()) for _, left, nonzero in operands
        )

    possible = [left for _, left, _ in operands if is_possible(left)]
    return min((*possible, wanted), key=cost)

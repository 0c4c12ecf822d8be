"""Find out how the dimensions of a converted network are composed of each other, by running its graphs once."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from hatify.answers import asks
from hatify.axes import Axes, Moves, Name, Names
from hatify.classify import is_altered, is_plain
from hatify.free import Free
from hatify.labels import ON, LabelSpace
from hatify.nn.functional import masked, masked_off
from hatify.nn.layers import HatLayer, family_of
from hatify.nn.norms import FEATURE_DIMS, is_known, keeps_features_apart
from hatify.nn.per_task import PerTask, PerTaskTensor
from hatify.nn.state import TaskState, looks_up_mask
from hatify.ops import Call, Findings, constant_labels, operation_of
from hatify.ops.movement import found_to_move, moved
from hatify.ops.registry import behind
from hatify.stepwise import tensors_in
from hatify.widening.composed import Axis, Misfit, unite
from hatify.widening.moved import relate_moved

Dims = list[Axis]


@dataclass
class Relations:
    """The axes of a network.

    Attributes:
        values: of each tensor that a node makes, the axis of each dimension.
        tensors: the same of parameters and buffers that graphs read themselves, by identity; of those that each task
            has its own of, by the identity of what holds them.
        modules: of layers (``"read"``, ``"written"``) and of normalisations (``"feature"``), by path; and, of those
            with groups, of these (``"groups"``) and of what the weight has of each (``"within"``).
        read: of each tensor, as `tensors` has them, the axes along which products sum over it.
    """

    values: dict[fx.Node, list[Dims]] = field(default_factory=dict)
    tensors: dict[int, Dims] = field(default_factory=dict)
    modules: dict[str, dict[str, Axis]] = field(default_factory=dict)
    read: dict[int, list[Axis]] = field(default_factory=dict)


def is_layer(module: nn.Module) -> bool:
    """Whether `module` computes what a weighted layer of torch's does, whether it carries a mask or not."""
    family = family_of(module)
    return family is not None and (isinstance(module, HatLayer) or is_plain(module, family))


class WithEverythingOn(fx.Interpreter):
    """Runs a flat graph of a converted network with all masks on."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, TaskState):
            return module.masks_from(module.scale.new_ones(module.num_slots))
        return module(*args, **kwargs)


class Relating(WithEverythingOn):
    """Runs a flat graph of a converted network with all masks on, and relates the axes of what its nodes make.

    Args:
        net: the network's children.
        graph: the graph.
        free: what the graph leaves free.
        found: where the axes are collected.
    """

    def __init__(self, net: nn.Module, graph: fx.Graph, free: Free, found: Relations) -> None:
        super().__init__(net, graph=graph)
        self.found, self.free = found, free
        self.findings, self.space = Findings(free), LabelSpace(couple=True)
        #: Nodes that read tensors, with the identities of these.
        self.held: dict[fx.Node, int] = {}

    # Running ---------------------------------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, nn.Parameter):
            self.findings.unsteady.add(n)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, TaskState) or looks_up_mask(n) or n.op == "output":
            for operand in n.all_input_nodes if n.op == "output" else ():
                self._fix(self.found.values.get(operand, ()), "it is an output")
            return out
        own = self.found.values[n] = self._held(n, module, out) or self._taken(n, out) or self._made(out)
        if own and n.op == "placeholder":
            self._fix(own, "it is an input")
        elif own and n.all_input_nodes and not self._is_item(n):
            try:
                self._relate(n, module, out)
            except Misfit:
                self._fix_all(n, f"{n.name} composes it in another way than the rest")
        return out

    @staticmethod
    def _made(out: Any) -> list[Dims]:
        return [[Axis(size) for size in t.shape] for t in tensors_in(out)]

    def _held(self, node: fx.Node, module: nn.Module | None, out: Any) -> list[Dims] | None:
        """The axes of a parameter or buffer, which are the same wherever it is read."""
        if not isinstance(out, Tensor) or not (node.op == "get_attr" or isinstance(module, PerTaskTensor)):
            return None
        key = self.held[node] = id(out) if node.op == "get_attr" else id(module)
        return [self.found.tensors.setdefault(key, self._made(out)[0])]

    def _is_item(self, node: fx.Node) -> bool:
        source = node.args[0] if node.target is operator.getitem else None
        return isinstance(source, fx.Node) and isinstance(self.env.get(source), (tuple, list, dict))

    def _taken(self, node: fx.Node, out: Any) -> list[Dims] | None:
        """The axes of what is taken out of a container."""
        if not self._is_item(node):
            return None
        source: Any = node.args[0]
        places = {id(t): i for i, t in enumerate(tensors_in(self.env[source]))}
        return [self.found.values[source][places[id(t)]] for t in tensors_in(out)]

    @staticmethod
    def _fix(values: Iterable[Dims], why: str) -> None:
        for dims in values:
            for axis in dims:
                axis.fix(why)

    def _fix_all(self, node: fx.Node, why: str) -> None:
        """Let nothing that goes into a node or comes out of it grow."""
        for other in (node, *node.all_input_nodes):
            self._fix(self.found.values.get(other, ()), why)

    def _first(self, node: Any) -> Dims:
        """The axes of a node's one tensor."""
        return self.found.values[node][0]

    # Operations ------------------------------------------------------------------------------------------------------

    def _relate(self, node: fx.Node, module: nn.Module | None, out: Any) -> None:
        if asks(node):
            return
        if node.target in (masked, masked_off):
            for a, b in zip(self._first(node), self._first(node.args[0]), strict=True):
                unite(a, b)
            return
        if isinstance(module, PerTask):
            module = module[module.choice.task]
        x = next(iter((*node.args, *node.kwargs.values())), None)
        if isinstance(x, fx.Node) and out is self.env[x]:  # as noise passes its input on in evaluation mode
            for a, b in zip(self._first(node), self._first(x), strict=True):
                unite(a, b)
            return
        if module is not None and isinstance(x, fx.Node) and isinstance(out, Tensor):
            if is_layer(module):
                return self._relate_layer(node, module, x)
            if is_known(module) or isinstance(module, nn.PReLU):
                return self._relate_norm(node, module, x)
        axes = self._axes(node, module, out)
        if isinstance(axes, Axes):
            self._relate_names(node, axes)
        elif isinstance(axes, Moves):
            self._relate_moved(node, axes)
        else:
            self._fix_all(node, f"{node.name} mixes it, or is not known to leave it as it is")

    def _axes(self, node: fx.Node, module: nn.Module | None, out: Any) -> Axes | Moves | None:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        call = Call(node, args, kwargs, out, module, self.space, self.findings, self._labels_of, self.env.__getitem__)
        if module is not None and is_altered(module):
            return None
        call.operation = operation_of(node, module)
        if call.operation is None:
            return moved(call) if isinstance(found_to_move(call), Tensor) else None
        return None if call.operation.cut is None else call.operation.cut(call)

    def _labels_of(self, argument: Any) -> Any:
        """Everything may be on, for all that is known here."""
        if isinstance(argument, fx.Node):
            return constant_labels(self.env.get(argument), ON)
        return tuple(self._labels_of(a) for a in argument) if isinstance(argument, (tuple, list)) else None

    def _relate_layer(self, node: fx.Node, layer: Any, x: fx.Node) -> None:
        family: Any = family_of(layer)
        read, written = family.dims(layer)
        own = self._first(node)
        of_path = self.found.modules.setdefault(str(node.target), {})
        spatial = len(getattr(layer, "kernel_size", ()))
        given = self._first(x)
        if read is None:
            pairs = list(zip(own[:-1], given, strict=True))
        else:
            lead = len(own) - 1 - spatial
            pairs = list(zip(own[:lead], given[:lead], strict=True))
            unite(of_path.setdefault("read", given[read]), given[read])
            for axis in (*given[lead + 1 :], *own[lead + 1 :]) if spatial else ():
                axis.fix("it is a position")
        unite(of_path.setdefault("written", own[written]), own[written])
        groups = getattr(layer, "groups", 1)
        if groups > 1:
            ours, theirs = (side.as_product([groups, side.size // groups]) for side in (own[written], given[read]))
            unite(ours[0], theirs[0])
            within = theirs if family.connection(layer).read == (1,) else ours
            of_path |= {"groups": ours[0], "within": within[1]}
        for a, b in pairs:
            unite(a, b)

    def _relate_norm(self, node: fx.Node, norm: Any, x: fx.Node) -> None:
        own, ndim = self._first(node), len(self._first(node))
        for a, b in zip(own, self._first(x), strict=True):
            unite(a, b)
        dims = range(1, 2) if isinstance(norm, nn.PReLU) else FEATURE_DIMS[type(norm)](norm, ndim)
        groups = getattr(norm, "num_groups", 1)
        apart = isinstance(norm, nn.PReLU) or keeps_features_apart(norm) or groups > 1
        if len(dims) > 1 or not (apart or "mask" in node.kwargs):
            for d in dims:
                own[d].fix(f"{node.target} normalises over it")
            return
        feature = own[dims[0]]
        if groups > 1:
            number, within = feature.as_product([groups, feature.size // groups])
            within.fix(f"{node.target} normalises over it")
            self.found.modules.setdefault(str(node.target), {}).setdefault("groups", number)
        if not (isinstance(norm, nn.PReLU) and norm.num_parameters == 1):
            axis = self.found.modules.setdefault(str(node.target), {}).setdefault("feature", feature)
            unite(axis, feature)

    def _relate_names(self, node: fx.Node, axes: Axes) -> None:
        found: dict[Name, Axis] = {}
        by_weight: set[Name] = set()
        given: list[tuple[Dims, Names]] = [(self._first(n), names) for n, names in axes.operands]
        made = zip(self.found.values[node], axes.outs, strict=True)
        for operand, names in axes.operands:
            if self._is_weight(operand):
                by_weight |= {name for name in names if name is not None}
        for dims, names in (*given, *made):
            for axis, name in zip(dims, names, strict=True):
                if name is not None:
                    unite(found.setdefault(name, axis), axis)
        left = {name for names in axes.outs for name in names}
        for name, axis in found.items():
            if name in axes.whole or name in axes.filled or (name not in left and name not in by_weight):
                axis.fix(f"{node.name} needs all of it")
        for operand, names in axes.operands:
            summed = [found[name] for name in names if name is not None and name not in left]
            if summed and self._is_weight(operand):
                for source in behind(operand, asks):
                    if source in self.held:
                        self.found.read.setdefault(self.held[source], []).extend(summed)
        grouped = [found[name].as_product([axes.groups, -(-found[name].size // axes.groups)]) for name in axes.grouped]
        for factors in grouped[1:]:
            unite(grouped[0][0], factors[0])

    def _is_weight(self, operand: fx.Node) -> bool:
        """Whether an operand follows from parameters alone."""
        sources = [n for n in behind(operand, asks) if not n.all_input_nodes]
        return all(n.op == "get_attr" or isinstance(self._module_at(n), PerTaskTensor) for n in sources)

    def _module_at(self, node: fx.Node) -> nn.Module | None:
        return self.fetch_attr(str(node.target)) if node.op == "call_module" else None

    def _relate_moved(self, node: fx.Node, moves: Moves) -> None:
        outs = self.found.values[node]
        for source in moves.sources:
            for d in moves.loose & set(range(len(source.maps))):
                self._first(source.node)[d].fix(f"{node.name} reads it at other places for other inputs")
        for operand in moves.by_shape:
            for a, b in zip(self._first(operand), outs[0], strict=True):
                if a.size == b.size:
                    unite(a, b)
        relate_moved(moves, [self._first(source.node) for source in moves.sources], outs, node.name)

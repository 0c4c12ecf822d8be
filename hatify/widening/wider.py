"""A copy of a converted network that has grown."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from hatify.errors import HatError
from hatify.nesting import FLAT
from hatify.nn.per_task import PerTask
from hatify.nn.state import STATE
from hatify.part import Part
from hatify.plan import Plan
from hatify.rounding import agree
from hatify.structure import children_of
from hatify.widening.beside import Beside, CannotGrow, outputs
from hatify.widening.composed import Axis, Grown, Growth
from hatify.widening.held import enlarged
from hatify.widening.plotted import Growing, Plotted
from hatify.widening.slots import CannotFollow, WiderSlots
from hatify.widening.statistics import normalise_over
from hatify.widening.widened import Place, Widened, place_of


class Wider:
    """A copy of a network that has grown.

    Args:
        plotted: the network.
        growth: what is to grow.
        numbers: draws the weights of what is new.

    Raises:
        CannotGrow: it would compute something else.
    """

    def __init__(self, plotted: Plotted, growth: Growth, numbers: torch.Generator) -> None:
        self.plotted = plotted
        model = plotted.model
        self.growing = Growing(plotted.relations, growth)
        try:
            self.slots = WiderSlots(model.plan.layout, plotted.masks, growth)
        except CannotFollow as found:
            why = "its features share masks across what would grow"
            raise CannotGrow((axis, why) for axis in found.axes) from found
        self.model = copy.deepcopy(model)
        for watcher in self.model.standing:
            watcher.disarm()
        self.model.__dict__.update(guard=None, opened=None)
        self.added = Widened(slots=place_of(self.slots.before, self.slots.layout.num_slots))
        #: Settings of modules that are others now, by identity of the original's.
        self.settings: dict[int, dict[str, Any]] = {}
        #: Parameters of the original with other shapes now: their name, themselves, and where their entries go.
        self.widened: list[tuple[str, Tensor, torch.Size, tuple[Place | None, ...]]] = []
        #: Of each graph: the nodes that are written otherwise, in the original and in the copy.
        self.changed: list[dict[str, tuple[fx.Node, fx.Node]]] = []
        self._widen_tensors(numbers)
        self._widen_modules()
        for task, e in enumerate(model.task_state.embeddings):
            self.widened.append((f"{STATE}.embeddings.{task}", e, e.shape, (self.added.slots,)))
        state = self.model.task_state
        state.rearrange(self.slots.layout, self.slots.before)
        old = torch.zeros(state.num_slots, dtype=torch.bool, device=state.scale.device)
        old[self.slots.before.to(old.device)] = True
        normalise_over(self.model, state.base if state.has_base else old)

    @torch.no_grad()
    def _widen_tensors(self, numbers: torch.Generator) -> None:
        pairs = zip(self.plotted.model.modules(), self.model.modules(), strict=True)
        self._twins = {id(module): twin for module, twin in pairs}
        done: set[int] = set()
        for held in self.plotted.held:
            dims = [self.growing.of(axis) for axis in held.axes]
            if not any(dims):
                continue
            places = tuple(None if g is None else place_of(g.place, len(g.like)) for g in dims)
            self.added.tensors[held.name] = places
            for owner, attribute in held.owners:
                tensor = getattr(self._twins[id(owner)], attribute)
                if id(tensor) not in done:
                    done.add(id(tensor))
                    self.widened.append((held.name, getattr(owner, attribute), tensor.shape, places))
                    tensor.data = enlarged(held, tensor.detach(), dims, numbers)

    def _widen_modules(self) -> None:
        for path, axes in self.plotted.relations.modules.items():
            module = self.plotted.net.get_submodule(path)
            for copied in module if isinstance(module, PerTask) else [module]:
                if settings := _settings(copied, axes, self.growing):
                    vars(self._twins[id(copied)]).update(settings)
                    self.settings[id(copied)] = self.added.modules[path] = settings

    # Verification ----------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Write the calls that mention sizes anew, and run everything beside the original.

        Raises:
            CannotGrow: something else comes out, or nothing does.
            HatError: it does for inputs of another size.
        """
        flat, net = self.model.flat_graphs, children_of(self.model)
        graphs = tuple(dict.fromkeys((flat[False], flat[True])))
        for graph, wide, inputs in zip(self.plotted.graphs, graphs, self.plotted.inputs, strict=True):
            beside = Beside(self.growing, self.plotted.free, (self.plotted.net, graph), (net, wide), inputs[0])
            beside.run()
            for others in inputs[1:]:
                expected, found = outputs(self.plotted.net, graph, others), outputs(net, wide, others)
                if not all(agree(b, a, []) for a, b in zip(expected, found, strict=True)):
                    raise HatError("widen: the network would compute something else for inputs of another size")
            self.added = replace(self.added, calls=(*self.added.calls, beside.calls))
            self.changed.append(beside.changed)

    # The plan --------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan of the copy."""
        before = self.plotted.model.plan
        dims_of: dict[int, list[Grown | None]] = {}
        for held in self.plotted.held:
            for owner, attribute in held.owners:
                dims_of[id(getattr(owner, attribute))] = [self.growing.of(axis) for axis in held.axes]
        uses = {}
        for name, of in before.uses.items():
            parameter = self.plotted.net.get_parameter(name)
            dims = dims_of.get(id(parameter), [None] * parameter.ndim)
            uses[name] = [self.slots.use(use, dims) for use in of]
        graphs = []
        for graph, planned in zip(self.plotted.graphs, before.graphs, strict=True):
            nodes = {node.name: node for node in graph.nodes}
            masks = {
                name: of_node
                if isinstance(of_node.dim, int)
                else replace(of_node, dim=self.growing.view(nodes[name], of_node.dim))
                for name, of_node in planned.masks.items()
            }
            graphs.append(replace(planned, masks=masks))
        return replace(
            before, layout=self.slots.layout, graphs=tuple(graphs), uses=uses, widened=before.widened.then(self.added)
        )

    def rewrite_part(self, part: Part) -> None:
        """Let the calls in a part of the copy mention the sizes that there are now."""
        seen = set()
        for mode, graph in part.graphs.items():
            if graph in seen:
                continue
            seen.add(graph)
            own, other = (self.changed[0], self.changed[-1]) if not mode else (self.changed[-1], self.changed[0])
            for node in graph.nodes:
                name = node.meta.get(FLAT)
                pair = own.get(name) or other.get(name)
                if pair is not None:
                    _rewrite_like(node, *pair)


#: The names of sizes among the settings of modules, by what they count.
_SIZES = {
    "written": ("out_features", "out_channels", "embedding_dim"),
    "read": ("in_features", "in_channels"),
    "feature": ("num_features", "num_channels", "num_parameters"),
    "groups": ("groups", "num_groups"),
    "within": (),
}


def _settings(module: nn.Module, axes: Mapping[str, Axis], growing: Growing) -> dict[str, Any]:
    """The sizes that a module has as settings, where they are others now."""
    sizes = {role: growing.size(axis) for role, axis in axes.items()}
    found: dict[str, Any] = {name: size for role, size in sizes.items() for name in _SIZES[role]}
    if "feature" in sizes:
        found["normalized_shape"] = (sizes["feature"],)
    return {name: value for name, value in found.items() if vars(module).get(name, value) != value}


def _rewrite_like(node: fx.Node, before: fx.Node, now: fx.Node) -> None:
    """Write a node of a part as the flat node `now`, which was `before`."""
    ours: list[fx.Node] = []
    theirs: list[fx.Node] = []
    map_arg((node.args, node.kwargs), ours.append)
    map_arg((before.args, before.kwargs), theirs.append)
    found = {then.name: own for then, own in zip(theirs, ours, strict=True)}
    node.op, node.target = now.op, now.target
    node.args, node.kwargs = map_arg((now.args, now.kwargs), lambda n: found[n.name])

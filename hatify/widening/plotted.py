"""A converted network whose axes are known, and what of it may grow.

Of the features of each mask it is the outermost factor that can: heads of attention and groups of convolutions in whole
units.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from hatify.converted import Converted
from hatify.plan import MaskedNode
from hatify.structure import children_of
from hatify.support import accepted_sizes, positional
from hatify.widening.composed import Axis, Grown, Growth, Misfit, composed, grown, unite
from hatify.widening.held import held_by
from hatify.widening.relate import Relating, Relations


class Growing:
    """What becomes of the axes of a network.

    Args:
        relations: the axes.
        growth: what grows.
    """

    def __init__(self, relations: Relations, growth: Growth) -> None:
        self.relations, self.growth = relations, growth
        self._known: dict[Axis, Grown] = {}

    def of(self, axis: Axis | None) -> Grown | None:
        """What becomes of an axis; None if nothing does."""
        if axis is None:
            return None
        root = axis.root
        if root not in self._known:
            self._known[root] = grown(root, self.growth)
        found = self._known[root]
        return found if found.along else None

    def size(self, axis: Axis) -> int:
        """How many indices it has then."""
        found = self.of(axis)
        return axis.size if found is None else len(found.like)

    def view(self, node: fx.Node, view: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a mask broadcasts to what a node makes; it was `view`."""
        (dims,) = self.relations.values[node]
        own = dims[len(dims) - len(view) :]
        return tuple(self.size(axis) if n > 1 else 1 for n, axis in zip(view, own, strict=True))


#: At how many sizes of inputs a network that has grown is compared with the original.
SIZES = 3


class Plotted:
    """A converted network whose axes are known.

    Attributes:
        graphs: its flat graphs, that for evaluation first.
        inputs: what they are run on, in the order of their placeholders: the example's, and a few others, for each.
        free: what the network leaves free.
        relations: its axes.
        masks: the axes of the features of each mask.
        given: the masks of inputs, which are what they are.
    """

    def __init__(self, model: Converted, inputs: Any) -> None:
        self.model = model
        flat = model.flat_graphs
        self.graphs = tuple(dict.fromkeys((flat[False], flat[True])))
        self.net, self.relations = children_of(model), Relations()
        sizes, self.free = accepted_sizes(self.net, self.graphs, inputs)
        self.inputs = [[positional(graph, given) for given in sizes[:SIZES]] for graph in self.graphs]
        for graph, given in zip(self.graphs, self.inputs, strict=True):
            Relating(self.net, graph, self.free, self.relations).run(*given[0])
        self.masks: dict[str, list[Axis]] = {}
        self.given: set[str] = set()
        for graph, planned in zip(self.graphs, model.plan.graphs, strict=True):
            nodes = {node.name: node for node in graph.nodes}
            for name, of_node in planned.masks.items():
                self._note_mask(of_node, nodes[name])
            self.given |= {of.mask for name, of in planned.masks.items() if nodes[name].op == "placeholder"}
        self.held = list(held_by(model, self.relations))

    def _note_mask(self, planned: MaskedNode, node: fx.Node) -> None:
        (dims,) = self.relations.values[node]
        if isinstance(planned.dim, int):
            own = [dims[planned.dim]]
        else:
            own = [axis for axis, size in zip(dims[-len(planned.dim) :], planned.dim, strict=True) if size > 1]
        known = self.masks.setdefault(planned.mask, own)
        try:
            unite(composed(known), composed(own))
        except Misfit:
            for axis in (*known, *own):
                axis.fix(f"{node.name} composes it in another way than the rest")

    def growth(self, share: float) -> Growth:
        """What is to grow: of each mask's features, the outermost factor that can."""
        found: dict[Axis, int] = {}

        def grow(axis: Axis) -> bool:
            if len(axis.factors) > 1:
                return any(grow(factor) for factor in axis.factors)
            if len(axis.pieces) > 1:
                return any([grow(piece) for piece in axis.pieces])
            if axis.fixed is not None or axis.size == 1:
                return False
            found[axis.root] = max(1, round(share * axis.size))
            return True

        for axes in self.masks.values():
            grow(composed(axes))
        return found

    def reasons(self, growth: Growth) -> dict[str, str]:
        """Why layers do not grow, by their masks."""
        found = {}
        for name, axes in self.masks.items():
            atoms = [atom for axis in axes for atom in axis.atoms()]
            if name not in self.given and not any(atom in growth for atom in atoms):
                largest = max((atom for atom in atoms if atom.fixed), key=lambda atom: atom.size, default=None)
                found[name] = "it has a single feature" if largest is None else str(largest.fixed)
        return found

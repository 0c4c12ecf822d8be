"""The plan of a conversion, as data: a policy for every parameter and buffer, a mask for every feature.

It speaks of nodes, modules and tensors by their names, so that it can be written to a file and carried out again on the
same network, captured anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.census import Census, Entry
from hatify.errors import CheckpointError
from hatify.free import FixedSizes
from hatify.policy import Policy
from hatify.slots import Layout, Use
from hatify.widening.widened import NOTHING, Widened


@dataclass(frozen=True)
class MaskedNode:
    """A node whose output is masked: by which mask, along which of its dimensions (or in which shape it broadcasts).

    Where the output is `steep`, gradients that are not finite may come back to features that are off. A normalisation
    written as a function may take its mask `inside`.
    """

    mask: str
    dim: int | tuple[int, ...]
    ndim: int
    steep: bool = False
    inside: bool = False


@dataclass(frozen=True)
class GraphPlan:
    """What is masked in one graph.

    Attributes:
        nodes: what the graph consists of before it is rewritten, in order; see `outline`.
        masks: the masks to insert, by the names of the nodes behind which they come.
    """

    nodes: tuple[str, ...]
    masks: dict[str, MaskedNode]


@dataclass(frozen=True)
class Plan:
    """Everything the rewrite needs to know.

    Attributes:
        modules: the policy of each called module with parameters or buffers.
        tensors: the policy of each parameter and buffer, by its first name.
        census: the same for people, with reasons.
        layout: where each mask lies among all slots.
        graphs: the masks in the graph for evaluation and, if that is another one, in that for training.
        uses: how the entries of each shared parameter connect features.
        owners: the mask of each masked layer or raw parameter.
        folded: layers whose weight is masked rather than their output.
        fixed: the sizes of each input for which this has been planned, where others were not seen to be taken.
        widened: what has been added since. Names and shapes of nodes and tensors (`graphs`, `census`) are those from
            before; all else is as it is now.
    """

    modules: dict[str, Policy]
    tensors: dict[str, Policy]
    census: Census
    layout: Layout
    graphs: tuple[GraphPlan, ...]
    uses: dict[str, list[Use]]
    owners: dict[str, str]
    folded: frozenset[str]
    fixed: dict[str, FixedSizes]
    widened: Widened = NOTHING

    def check(self, net: nn.Module, graphs: tuple[fx.Graph, ...]) -> None:
        """Raise a `CheckpointError` that names the first difference unless this is a plan for `net` and `graphs`."""
        named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
        found = [f"{name} {tuple(value.shape)}" for name, value in named]
        _check_same((f"{entry.name} {entry.shape}" for entry in self.census), found, "parameter or buffer")
        for planned, graph in zip_longest(self.graphs, graphs):
            _check_same(planned.nodes if planned else (), outline(graph) if graph else (), "operation")

    def to_data(self) -> tuple[dict[str, Any], Tensor]:
        """The plan as what JSON can hold, and an int32 tensor that holds all its numbers of slots."""
        numbers = _Numbers()
        return {
            "modules": {path: str(policy) for path, policy in self.modules.items()},
            "tensors": {name: str(policy) for name, policy in self.tensors.items()},
            "census": [[e.name, e.kind, str(e.policy), list(e.shape), e.reason] for e in self.census],
            "groups": {name: list(slots) for name, slots in self.layout.groups.items()},
            "indices": {name: numbers.put(index) for name, index in self.layout.indices.items()},
            "graphs": [
                {
                    "nodes": list(graph.nodes),
                    "masks": {node: [m.mask, m.dim, m.ndim, m.steep, m.inside] for node, m in graph.masks.items()},
                }
                for graph in self.graphs
            ],
            "uses": {
                name: [[numbers.put(use.written), None if use.read is None else numbers.put(use.read)] for use in uses]
                for name, uses in self.uses.items()
            },
            "owners": self.owners,
            "folded": sorted(self.folded),
            "fixed": self.fixed,
            "widened": self.widened.to_data() if self.widened.slots else None,
        }, numbers.packed()

    @classmethod
    def from_data(cls, data: dict[str, Any], packed: Tensor) -> Plan:
        """The plan that `to_data` made these of."""

        def numbers(place: list[int]) -> Tensor:
            start, *shape = place
            return packed[start : start + torch.Size(shape).numel()].long().view(shape)

        def dims(dim: int | list[int]) -> int | tuple[int, ...]:
            return dim if isinstance(dim, int) else tuple(dim)

        return cls(
            {path: Policy(policy) for path, policy in data["modules"].items()},
            {name: Policy(policy) for name, policy in data["tensors"].items()},
            Census(
                Entry(name, kind, Policy(p), tuple(shape), reason) for name, kind, p, shape, reason in data["census"]
            ),
            Layout(
                {name: (start, stop) for name, (start, stop) in data["groups"].items()},
                {name: numbers(place) for name, place in data["indices"].items()},
            ),
            tuple(
                GraphPlan(
                    tuple(graph["nodes"]),
                    {
                        # Earlier plans do not say which masks are taken inside: none is.
                        node: MaskedNode(mask, dims(dim), *rest)
                        for node, (mask, dim, *rest) in graph["masks"].items()
                    },
                )
                for graph in data["graphs"]
            ),
            {
                name: [Use(numbers(written), None if read is None else numbers(read)) for written, read in uses]
                for name, uses in data["uses"].items()
            },
            dict(data["owners"]),
            frozenset(data["folded"]),
            {
                name: tuple(tuple((dim, size) for dim, size in sizes) for sizes in tensors)
                for name, tensors in data["fixed"].items()
            },
            # Earlier plans do not say whether anything has been added: nothing has.
            Widened.from_data(added) if (added := data.get("widened")) else NOTHING,
        )


def outline(graph: fx.Graph) -> tuple[str, ...]:
    """What a graph consists of, node by node: its name, the module, tensor, method or function, and its inputs."""

    def described(argument: Any) -> str:
        if isinstance(argument, (list, tuple)):
            return f"({', '.join(map(described, argument))})"
        if isinstance(argument, slice):
            return ":".join(map(described, (argument.start, argument.stop, argument.step)))
        simple = argument is None or isinstance(argument, (fx.Node, bool, int, float, str, torch.dtype))
        return str(argument) if simple else type(argument).__name__

    lines = []
    for node in graph.nodes:
        kwargs = (f"{name}={described(value)}" for name, value in node.kwargs.items())
        target = getattr(node.target, "__name__", node.target)
        lines.append(f"{node.name}: {target}({', '.join((*map(described, node.args), *kwargs))})")
    return tuple(lines)


def _check_same(planned: Iterable[str], found: Iterable[str], what: str) -> None:
    for then, now in zip_longest(planned, found):
        if then != now:
            raise CheckpointError(
                f"the network is another one than was saved: the first {what} that differs was {then or 'not there'}, "
                f"and is {now or 'not there'} now"
            )


class _Numbers:
    """Packs tensors of slots into one; those that are equal once."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.length = 0
        self.known: dict[bytes, int] = {}

    def put(self, tensor: Tensor) -> list[int]:
        """Where `tensor` lies in the packed one, and its shape."""
        flat = tensor.reshape(-1).to("cpu", torch.int32)
        content = flat.numpy().tobytes()
        if content not in self.known:
            self.known[content] = self.length
            self.pieces.append(flat)
            self.length += flat.numel()
        return [self.known[content], *tensor.shape]

    def packed(self) -> Tensor:
        return torch.cat(self.pieces) if self.pieces else torch.empty(0, dtype=torch.int32)

"""What has been added to a network since its conversion, as data: it can be written to a file, and done again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

#: Where the indices of a dimension have gone: its size now, and the (first, count) of each run of them.
Place = tuple[int, tuple[tuple[int, int], ...]]
#: A call as it is now: the name of torch's function if that is another one, its arguments, those by name.
Written = tuple[str | None, Any, Any]


@dataclass(frozen=True)
class Widened:
    """What has been added.

    Attributes:
        modules: settings of modules that are others now, {path: {name: value}}.
        tensors: where the entries of parameters and buffers have gone, {name: a place for each dimension, or None}.
        calls: of each graph, the calls that mention sizes that are others now, {name of the node: the call}.
        slots: where the slots of the conversion have gone; None: nothing has been added.
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, tuple[Place | None, ...]] = field(default_factory=dict)
    calls: tuple[dict[str, Written], ...] = ()
    slots: Place | None = None

    def then(self, other: Widened) -> Widened:
        """This, and then `other`."""
        paths = self.modules | other.modules
        modules = {path: self.modules.get(path, {}) | other.modules.get(path, {}) for path in paths}
        tensors = dict(self.tensors)
        for name, dims in other.tensors.items():
            before = tensors.get(name, (None,) * len(dims))
            tensors[name] = tuple(_behind(a, b) for a, b in zip(before, dims, strict=True))
        calls: list[dict[str, Written]] = []
        for earlier, later in zip(self.calls or ({},) * len(other.calls), other.calls, strict=True):
            found = dict(earlier)
            for name, (target, args, kwargs) in later.items():
                # What another function has been called for since, is still.
                found[name] = (target or found.get(name, (None,))[0], args, kwargs)
            calls.append(found)
        return Widened(modules, tensors, tuple(calls), _behind(self.slots, other.slots))

    def shape(self, name: str, before: Sequence[int]) -> tuple[int, ...]:
        """The shape now of a parameter or buffer of the original."""
        dims = self.tensors.get(name, (None,) * len(before))
        return tuple(n if place is None else place[0] for n, place in zip(before, dims, strict=True))

    def to_data(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"modules": self.modules, "tensors": self.tensors, "calls": self.calls, "slots": self.slots}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Widened:
        """What `to_data` made this of."""
        return cls(
            {path: {name: _settled(v) for name, v in of.items()} for path, of in data["modules"].items()},
            {name: tuple(map(_place, dims)) for name, dims in data["tensors"].items()},
            tuple(
                {name: (target, args, kwargs) for name, (target, args, kwargs) in of.items()} for of in data["calls"]
            ),
            _place(data["slots"]),
        )


#: Where nothing has been added.
NOTHING = Widened()


def _settled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _place(data: Any) -> Place | None:
    return None if data is None else (data[0], tuple((first, count) for first, count in data[1]))


def place_of(indices: Tensor, size: int) -> Place | None:
    """Where indices have gone, int64, ascending; None if they have stayed where they were."""
    if len(indices) == size:
        return None
    starts = [0, *((indices.diff() != 1).nonzero().squeeze(1) + 1).tolist(), len(indices)]
    runs = tuple((int(indices[a]), b - a) for a, b in pairwise(starts) if b > a)
    return size, runs


def indices_of(place: Place) -> Tensor:
    """The opposite of `place_of`."""
    return torch.cat([torch.arange(first, first + count) for first, count in place[1]])


def count_of(place: Place) -> int:
    """How many indices there were."""
    return sum(count for _, count in place[1])


def _behind(first: Place | None, second: Place | None) -> Place | None:
    """Where indices have gone in two moves."""
    if first is None or second is None:
        return first or second
    return place_of(indices_of(second)[indices_of(first)], second[0])


def into_place(value: Tensor, dims: Sequence[Place | None], out: Tensor) -> Tensor:
    """Write `value` to where its entries have gone in `out`."""
    for d, place in enumerate(dims):
        if place is not None:
            indices = indices_of(place).to(value.device)
            wide = value.new_zeros([place[0] if e == d else n for e, n in enumerate(value.shape)])
            value = wide.index_copy(d, indices, value)
    there = torch.ones((), dtype=torch.bool, device=value.device)
    for d, place in enumerate(dims):
        if place is not None:
            line = torch.zeros(place[0], dtype=torch.bool).index_fill(0, indices_of(place), True)
            there = there & line.to(value.device).view([-1 if e == d else 1 for e in range(len(dims))])
    return torch.where(there, value, out)


# Calls ---------------------------------------------------------------------------------------------------------------


def written(value: Any, name_of: Mapping[fx.Node, str]) -> Any:
    """Arguments of a call as JSON can hold them; nodes by their names.

    Raises:
        TypeError: they hold something else.
    """
    if isinstance(value, fx.Node):
        return {"node": name_of.get(value, value.name)}
    if isinstance(value, slice):
        return {"slice": [written(end, name_of) for end in (value.start, value.stop, value.step)]}
    if isinstance(value, (tuple, list)):
        return {"list" if isinstance(value, list) else "tuple": [written(item, name_of) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: written(item, name_of) for key, item in value.items()}}
    if value is Ellipsis:
        return {"ellipsis": True}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} cannot be written down")


def read(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The opposite of `written`."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "node":
        return nodes[content]
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dict":
        return {key: read(item, nodes) for key, item in content.items()}
    items = [read(item, nodes) for item in content]
    return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)


# Doing it again ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def enlarge(net: nn.Module, graphs: Iterable[fx.Graph], added: Widened) -> None:
    """Give a network as it was before its conversion the sizes that the converted one has now, in place.

    What is new is zero.
    """
    for path, settings in added.modules.items():
        vars(net.get_submodule(path)).update(settings)
    tensors = dict((*net.named_parameters(), *net.named_buffers()))
    for name, dims in added.tensors.items():
        value = tensors[name]
        shape = [n if place is None else place[0] for n, place in zip(value.shape, dims, strict=True)]
        value.data = into_place(value.data, dims, value.new_zeros(shape))
    for graph, calls in zip(graphs, added.calls, strict=False):
        nodes = {node.name: node for node in graph.nodes}
        for name, (target, args, kwargs) in calls.items():
            node = nodes[name]
            if target is not None:
                node.op, node.target = "call_function", getattr(torch, target)
            node.args, node.kwargs = read(args, nodes), read(kwargs, nodes)

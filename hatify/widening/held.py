"""The parameters and buffers whose axes are known, and what they hold of features that are new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hatify.converted import Converted
from hatify.nn.layers import family_of
from hatify.nn.per_task import PerTask, PerTaskTensor
from hatify.structure import children_of
from hatify.widening.composed import Axis, Grown, unite
from hatify.widening.relate import Relations, is_layer

#: How each dimension of a tensor has grown; None: not at all.
Dims = list[Grown | None]
#: What the entries of a tensor are that are new.
Fill = Callable[[Tensor, Dims, torch.Generator], Tensor]


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the network, or of a part that tasks have copies of.

    Attributes:
        name: in the original.
        owners: what holds it, or its copies, and under which names.
        axes: of its dimensions; None where they cannot grow.
        fill: what the entries are that are new, given those that are like them, and how the dimensions have grown.
    """

    name: str
    owners: list[tuple[nn.Module, str]]
    axes: list[Axis | None]
    fill: Fill


def held_by(model: Converted, relations: Relations) -> Iterator[Held]:
    """Everything with axes, once."""
    seen: dict[int, list[Axis | None]] = {}

    def once(found: Iterable[Held]) -> Iterator[Held]:
        for held in found:
            owner, attribute = held.owners[0]
            tensor = getattr(owner, attribute)
            if id(tensor) not in seen:
                seen[id(tensor)] = held.axes
                yield held
                continue
            for a, b in zip(seen[id(tensor)], held.axes, strict=True):
                if a is not None and b is not None:
                    unite(a, b)
                else:
                    for axis in (x for x in (a, b) if x is not None):
                        axis.fix(f"{held.name} has it in two ways")

    net, quiet = children_of(model), model.task_state.has_base
    for path, axes in relations.modules.items():
        module = net.get_submodule(path)
        copies = list(module) if isinstance(module, PerTask) else [module]
        yield from once(_of_layer(path, copies, axes) if is_layer(copies[0]) else _of_norm(path, copies, axes, quiet))
    yield from once(_of_graph(model, relations))


def _of_layer(path: str, copies: list[nn.Module], axes: Mapping[str, Axis]) -> Iterator[Held]:
    layer: Any = copies[0]
    family: Any = family_of(layer)
    connection = family.connection(layer)
    own: list[Axis | None] = [None] * layer.weight.ndim
    for name, dims in (("written", connection.written), ("read", connection.read)):
        if dims:
            own[dims[0]] = axes.get("within" if connection.groups > 1 and dims == (1,) else name)
    fill = partial(_connecting, read=connection.read)
    yield Held(f"{path}.weight", [(m, "weight") for m in copies], own, fill)
    if getattr(layer, "bias", None) is not None:
        bias = axes.get("written")
        yield Held(f"{path}.bias", [(m, "bias") for m in copies], [bias], partial(_constant, value=0.0))


#: How loud features are at first that come beside a locked base, which is as it should be from the first step: heads
#: take the output of a layer up by the rate of the optimizer, whatever is in it.
QUIET = 0.1
#: What normalisations hold of a feature at first.
_AT_FIRST = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


def _of_norm(path: str, copies: list[nn.Module], axes: Mapping[str, Axis], quiet: bool) -> Iterator[Held]:
    feature, norm = axes["feature"], copies[0]
    for name, value in (*norm._parameters.items(), *norm._buffers.items()):
        if value is not None and value.shape == (feature.size,):
            first = None if isinstance(norm, nn.PReLU) else _AT_FIRST.get(name)
            first = QUIET if quiet and name == "weight" and first is not None else first
            fill = _like if first is None else partial(_constant, value=first)
            yield Held(f"{path}.{name}", [(m, name) for m in copies], [feature], fill)


def _of_graph(model: Converted, relations: Relations) -> Iterator[Held]:
    """Parameters and buffers that graphs read themselves."""
    for path, module in model.named_modules():
        if isinstance(module, PerTaskTensor) and id(module) in relations.tensors:
            tasks = range(len(module._parameters) + len(module._buffers))
            yield _of_name(path, [(module, str(task)) for task in tasks], id(module), relations)
            continue
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and id(value) in relations.tensors:
                yield _of_name(f"{path}.{name}" if path else name, [(module, name)], id(value), relations)


def _of_name(name: str, owners: list[tuple[nn.Module, str]], key: int, relations: Relations) -> Held:
    axes, summed = relations.tensors[key], {axis.root for axis in relations.read.get(key, ())}
    read = tuple(d for d, axis in enumerate(axes) if axis.root in summed)
    return Held(name, owners, [*axes], partial(_connecting, read=read) if read else _like)


def _like(value: Tensor, dims: Dims, numbers: torch.Generator) -> Tensor:
    """What the features have that new ones are like."""
    return value


def _constant(like: Tensor, dims: Dims, numbers: torch.Generator, value: float) -> Tensor:
    return torch.full_like(like, value)


def _connecting(value: Tensor, dims: Dims, numbers: torch.Generator, read: tuple[int, ...]) -> Tensor:
    """New features read everything, by random weights as large as the others; nothing else reads new ones."""
    new = torch.zeros((), dtype=torch.bool, device=value.device)
    for d, axis in enumerate(dims):
        if axis is not None and d not in read:
            new = new | axis.is_new.to(value.device).view([-1 if e == d else 1 for e in range(value.ndim)])
    size = value.float().square().mean().sqrt()
    random = torch.randn(value.shape, generator=numbers).to(value.device) * size
    return torch.where(new, random.to(value.dtype), 0.0)


def enlarged(held: Held, value: Tensor, dims: Dims, numbers: torch.Generator) -> Tensor:
    """What is held, where `dims` have grown: its value, and what is new."""
    new = torch.zeros((), dtype=torch.bool, device=value.device)
    for d, axis in enumerate(dims):
        if axis is not None:
            value = value.index_select(d, axis.like.to(value.device))
            new = new | axis.is_new.to(value.device).view([-1 if e == d else 1 for e in range(value.ndim)])
    return torch.where(new, held.fill(value, dims, numbers), value)

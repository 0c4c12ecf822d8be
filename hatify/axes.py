"""Axes: how the dimensions of an operation's operands and outputs belong together.

What is left of a dimension, once a task's zeros are taken out, is *kept*: bool, shape (size,). An operation says which
of its dimensions must lose the same indices, by giving them one name (`Axes`), or which element comes from where
(`Moves`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

Name = str | int
#: A name for each dimension of a tensor; None for one of size 1, which is spread.
Names = tuple[Name | None, ...]
#: What is kept along each dimension of a tensor.
Kept = tuple[Tensor, ...]


@dataclass(frozen=True)
class Axes:
    """The dimensions around an operation, by name.

    A name that no output has is summed over: only the indices at which no operand is zero matter.

    Attributes:
        operands: the tensors that go in, with the names of their dimensions.
        outs: the names of the dimensions of each tensor that comes out.
        whole: names of which everything is asked for.
        filled: names along which zeros are put back ahead of the operation.
        needed: indices that are needed whether or not they are wanted.
        grouped: names that consist of groups, of which each keeps equally many indices, or none.
        groups: how many groups.
    """

    operands: tuple[tuple[fx.Node, Names], ...]
    outs: tuple[Names, ...]
    whole: frozenset[Name] = frozenset()
    filled: frozenset[Name] = frozenset()
    needed: Mapping[Name, Tensor] = field(default_factory=dict)
    grouped: tuple[Name, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Source:
    """A tensor whose elements an operation moves.

    Attributes:
        node: the tensor.
        maps: for each of its dimensions, and each output: the index + 1 along it of each element of the output, with
            size 1 where that is constant. None for dimensions of size 1.
        inside: for each output, which elements come from here.
    """

    node: fx.Node
    maps: tuple[tuple[Tensor, ...] | None, ...]
    inside: tuple[Tensor, ...]


@dataclass(frozen=True)
class Moves:
    """An operation that moves elements.

    Attributes:
        sources: the tensors that go in.
        shapes: of the outputs.
        loose: dimensions of the sources along which other inputs may be read at other indices.
        by_shape: operands of which only the shape is read, which is that of the output.
    """

    sources: tuple[Source, ...]
    shapes: tuple[torch.Size, ...]
    loose: frozenset[int] = frozenset()
    by_shape: tuple[fx.Node, ...] = ()

    def asked(self, source: Source, wanted: Sequence[Kept], sizes: Sequence[int]) -> Kept:
        """What of a source, of these `sizes`, is needed for what is `wanted` of each output."""
        return tuple(
            torch.ones(n, dtype=torch.bool) if maps is None or d in self.loose else _read(maps, wanted, n)
            for d, (maps, n) in enumerate(zip(source.maps, sizes, strict=True))
        )

    def arriving(self, kept: Sequence[Kept], wanted: Sequence[Kept]) -> tuple[Kept, ...]:
        """What comes out where `kept` is left of each source; of what comes from elsewhere, what is `wanted`."""
        return tuple(self._arriving(out, shape, kept, wanted[out]) for out, shape in enumerate(self.shapes))

    def _arriving(self, out: int, shape: torch.Size, kept: Sequence[Kept], wanted: Kept) -> Kept:
        covered, arrives = (torch.zeros((1,) * len(shape), dtype=torch.bool) for _ in range(2))
        for source, own in zip(self.sources, kept, strict=True):
            left = source.inside[out]
            for maps, axis in zip(source.maps, own, strict=True):
                if maps is not None:
                    left = left & axis[(maps[out] - 1).clamp(min=0)]
            covered, arrives = covered | source.inside[out], arrives | left
        covered, arrives = covered.expand(shape), arrives.expand(shape)
        return tuple(
            any_but(arrives, d) | (own & any_but(~covered, d)) if size > 1 else torch.ones(size, dtype=torch.bool)
            for d, (size, own) in enumerate(zip(shape, wanted, strict=True))
        )


def _read(maps: tuple[Tensor, ...], wanted: Sequence[Kept], size: int) -> Tensor:
    """The indices, of `size`, that the wanted part of the outputs is read at."""
    asked = torch.zeros(size + 1, dtype=torch.bool)
    for found, dims in zip(maps, wanted, strict=True):
        for d, own in enumerate(dims):
            if found.shape[d] > 1:
                found = found[(slice(None),) * d + (own,)]
            elif not own.any():
                found = found[(slice(None),) * d + (slice(0),)]
        asked[found.flatten()] = True
    return asked[1:]


def levelled(axes: Iterable[Tensor], groups: int) -> list[Tensor]:
    """What is kept along `axes` that consist of groups, enlarged so that each group keeps equally many, or none."""
    rows = [axis.view(groups, -1) for axis in axes]
    alive = torch.stack([row.any(1) for row in rows]).any(0).unsqueeze(1)
    result = []
    for row in rows:
        count = max(1, int(row.sum(1).max()))
        first = (~row).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        result.append((row | (torch.zeros_like(row).scatter(1, first, True) & alive)).flatten())
    return result


def any_but(value: Tensor, dim: int) -> Tensor:
    """Whether anything is True at each index along `dim`."""
    others = [d for d in range(value.ndim) if d != dim]
    return value.any(others) if others else value


def everything(shape: Sequence[int]) -> Kept:
    """All of a tensor."""
    return tuple(torch.ones(size, dtype=torch.bool) for size in shape)

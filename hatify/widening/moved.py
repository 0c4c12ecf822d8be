"""How a movement of elements composes the dimensions of what it makes of those of what it is given.

What is told is told by numbers: at which index of each dimension of the source each element of the output is. Indices
that follow each other are a run: a piece of one axis is a piece of the other. Where an axis of one side follows from
several of the other, as by a reshape, its index is a number whose digits are theirs: factors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from hatify.axes import Moves
from hatify.widening.composed import Axis, Misfit, unite

Dims = list[Axis]


def relate_moved(moves: Moves, sources: Sequence[Dims], outs: Sequence[Dims], name: str) -> None:
    """Compose the axes of outputs of those of the sources of a movement, which is called `name`."""
    runs: list[_Run] = []
    digits: list[_Digit] = []
    for source, own in zip(moves.sources, sources, strict=True):
        for axis, maps in zip(own, source.maps, strict=True):
            for out, index in zip(outs, maps or (), strict=False):
                found = _followed(axis, out, index)
                if found is None:
                    axis.fix(f"{name} reads a part of it")
                    for made, size in zip(out, index.shape, strict=True):
                        if size > 1:
                            made.fix(f"{name} makes it of parts of others")
                runs += [f for f in found or () if isinstance(f, _Run)]
                digits += [f for f in found or () if isinstance(f, _Digit)]
    for apart in (*_linked(runs, _compose_runs), *_linked(digits, _compose_digits)):
        for axis in apart:
            axis.fix(f"{name} composes it in another way than the rest")


@dataclass(frozen=True)
class _Run:
    """Indices of an axis that follow each other come from such indices of another one."""

    source: Axis
    start: int
    out: Axis
    first: int
    length: int


@dataclass(frozen=True)
class _Digit:
    """A factor of one axis is a factor of another: with how many indices inside of it in each."""

    source: Axis
    stride: int
    out: Axis
    inner: int
    count: int


#: Either of them.
T = TypeVar("T", bound="_Run | _Digit")


def _followed(source: Axis, out: Dims, index: Tensor) -> list[_Run | _Digit] | None:
    """What an axis of an output has of `source`, given the index + 1 along that for each of its elements."""
    along = [e for e, size in enumerate(index.shape) if size > 1]
    if not along:
        return None if source.size > 1 else []
    if len(along) == 1:
        run = _as_run(index.flatten())
        if run is not None:
            start, first, length = run
            return [_Run(source, start, out[along[0]], first, length)]
    if not (index > 0).all():
        return None
    origin = index[(0,) * index.ndim]
    if origin != 1:
        return None
    found: list[_Run | _Digit] = []
    total = torch.zeros_like(index)
    for e in along:
        profile = index[tuple(slice(None) if d == e else 0 for d in range(index.ndim))] - 1
        digit = _as_digit(profile)
        if digit is None:
            return None
        inner, count, stride = digit
        found.append(_Digit(source, stride, out[e], inner, count))
        total = total + profile.view([-1 if d == e else 1 for d in range(index.ndim)])
    return found if torch.equal(total + 1, index) else None


def _as_run(index: Tensor) -> tuple[int, int, int] | None:
    """(start, first, length) where the indices + 1 from `first` on count up from `start`; all others are 0."""
    there = index.nonzero().squeeze(1)
    if not len(there):
        return None
    first, length = int(there[0]), len(there)
    expected = torch.zeros_like(index)
    expected[first : first + length] = index[first] + torch.arange(length)
    return (int(index[first]) - 1, first, length) if torch.equal(index, expected) else None


def _as_digit(profile: Tensor) -> tuple[int, int, int] | None:
    """(inner, count, stride) where position x has the index (x // inner % count) · stride."""
    moving = profile.nonzero()
    if not len(moving):
        return None
    inner = int(moving[0])
    stride = int(profile[inner])
    steps = profile[::inner]
    back = (steps == 0).nonzero().squeeze(1)
    count = int(back[1]) if len(back) > 1 else len(steps)
    expected = torch.arange(len(profile)) // inner % count * stride
    return (inner, count, stride) if stride > 0 and torch.equal(profile, expected) else None


def _linked(found: Sequence[T], compose: Callable[[Sequence[T]], None]) -> Iterator[list[Axis]]:
    """Compose the axes of what has been found, those that have to do with each other at a time.

    Yields those that cannot be composed.
    """
    groups: list[list[T]] = []
    for one in found:
        ends = {one.source, one.out}
        near: list[list[T]] = [group for group in groups if any({other.source, other.out} & ends for other in group)]
        groups = [group for group in groups if not any(group is other for other in near)]
        groups.append([one, *(other for group in near for other in group)])
    for group in groups:
        try:
            compose(group)
        except Misfit:
            yield [axis for one in group for axis in (one.source, one.out)]


def _compose_runs(runs: Sequence[_Run]) -> None:
    """Make pieces of axes, and let those be the same that are runs of each other."""
    cuts: dict[int, set[int]] = defaultdict(set)
    axes: dict[int, Axis] = {}
    for run in runs:
        for axis, begin in ((run.source, run.start), (run.out, run.first)):
            axes[id(axis)] = axis
            cuts[id(axis)] |= {0, begin, begin + run.length, axis.size}
    changed = True
    while changed:  # where one side is cut within a run, so is the other
        changed = False
        for run in runs:
            ours, theirs = cuts[id(run.source)], cuts[id(run.out)]
            offset = run.first - run.start
            there = {c + offset for c in ours if run.start < c < run.start + run.length} - theirs
            here = {c - offset for c in theirs if run.first < c < run.first + run.length} - ours
            theirs |= there
            ours |= here
            changed |= bool(there or here)
    pieces: dict[int, dict[int, Axis]] = {}
    for key, axis in axes.items():
        bounds = sorted(cuts[key])
        sizes = [b - a for a, b in pairwise(bounds)]
        pieces[key] = dict(zip(bounds, axis.as_pieces(sizes), strict=False))
    for run in runs:
        for begin, piece in pieces[id(run.source)].items():
            if run.start <= begin < run.start + run.length:
                unite(piece, pieces[id(run.out)][begin + run.first - run.start])


def _compose_digits(digits: Sequence[_Digit]) -> None:
    """Make factors of axes, and let those be the same that are digits of each other."""
    factors: dict[int, dict[int, Axis]] = {}
    found: dict[int, tuple[Axis, set[tuple[int, int]]]] = {}
    for digit in digits:
        for axis, inside in ((digit.source, digit.stride), (digit.out, digit.inner)):
            found.setdefault(id(axis), (axis, set()))[1].add((inside, digit.count))
    for key, (axis, places) in found.items():
        sizes: dict[int, int] = {}  # of the factors, the innermost first, by how many indices are inside
        reached = 1
        for inside, count in (*sorted(places), (axis.size, 1)):
            if inside % reached:
                raise Misfit
            if inside > reached:
                sizes[reached] = inside // reached
            if count > 1:
                sizes[inside] = count
            reached = inside * count
        if math.prod(sizes.values()) != axis.size:
            raise Misfit
        parts = axis.as_product([*sizes.values()][::-1])[::-1]
        factors[key] = dict(zip(sizes, parts, strict=True))
    for digit in digits:
        unite(factors[id(digit.source)][digit.stride], factors[id(digit.out)][digit.inner])

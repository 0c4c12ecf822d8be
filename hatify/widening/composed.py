"""How the dimensions of a network are composed of each other.

Operations say which dimensions go along together: those of one name are one axis. A reshape makes an axis of several,
its factors; a concatenation joins several, its pieces. What is neither is an atom. Once every operation has been
looked at, an atom that nothing holds fixed can get more indices, and all that is composed of it grows along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class Misfit(Exception):
    """Two ways to compose an axis that do not go together."""


class Axis:
    """A dimension, or several that have been found to be the same."""

    def __init__(self, size: int, factors: Sequence[Axis] = (), pieces: Sequence[Axis] = ()) -> None:
        self.size, self._factors, self._pieces = size, list(factors), list(pieces)
        self._same: Axis | None = None
        self._fixed: str | None = None

    @property
    def root(self) -> Axis:
        """The one that speaks for all that are the same."""
        axis = self
        while axis._same is not None:
            axis = axis._same
        return axis

    @property
    def fixed(self) -> str | None:
        """Why an atom cannot grow."""
        return self.root._fixed

    @property
    def factors(self) -> list[Axis]:
        """What it is a product of, the outermost first, as fine as is known; itself, if it is no product."""
        root = self.root
        return [inner for factor in root._factors for inner in factor.factors] if root._factors else [root]

    @property
    def pieces(self) -> list[Axis]:
        """What is joined in it, likewise."""
        root = self.root
        return [inner for piece in root._pieces for inner in piece.pieces] if root._pieces else [root]

    def atoms(self) -> Iterator[Axis]:
        """What it is composed of in the end."""
        root = self.root
        parts = root._factors or root._pieces
        if not parts:
            yield root
        for part in parts:
            yield from part.atoms()

    def fix(self, why: str) -> None:
        """Let it keep its size."""
        for atom in self.atoms():
            atom._fixed = atom._fixed or why

    def as_product(self, sizes: Sequence[int]) -> list[Axis]:
        """The factors of these sizes that it is a product of.

        Raises:
            Misfit: it is composed in another way.
        """
        wanted = [size for size in sizes if size > 1]
        found = iter(self._regrouped(wanted, self.factors, self._as_factors, math.prod, 1, composed))
        return [next(found) if size > 1 else Axis(1) for size in sizes]

    def as_pieces(self, sizes: Sequence[int]) -> list[Axis]:
        """The pieces of these sizes that are joined in it.

        Raises:
            Misfit: it is composed in another way.
        """
        return self._regrouped(list(sizes), self.pieces, self._as_pieces, sum, 0, _joined)

    def _regrouped(
        self,
        wanted: list[int],
        parts: list[Axis],
        bind: Callable[[list[int]], list[Axis]],
        total: Callable[[list[int]], int],
        nothing: int,
        compose: Callable[[Sequence[Axis]], Axis],
    ) -> list[Axis]:
        """The parts, put together (or, where they are too large, taken apart) so that they have the sizes `wanted`."""
        if total(wanted) != self.size:
            raise Misfit
        if len(wanted) < 2:
            return [self.root] * len(wanted)
        if len(parts) == 1:
            return bind(wanted)
        found, left = [], list(parts)
        for size in wanted:
            group: list[Axis] = []
            while (reached := total([a.size for a in group]) if group else nothing) != size:
                if not left:
                    raise Misfit
                part = left.pop(0)
                missing = size // reached if nothing else size - reached
                if part.size > missing:
                    rest = part.size // missing if nothing else part.size - missing
                    if total([missing, rest]) != part.size:
                        raise Misfit
                    part, remainder = (part.as_product if nothing else part.as_pieces)([missing, rest])
                    left.insert(0, remainder)
                group.append(part)
            found.append(group[0] if len(group) == 1 else compose(group))
        return found

    def _as_factors(self, sizes: list[int]) -> list[Axis]:
        root = self.root
        if root._pieces:
            # Equal pieces, each of which has the factors but the first.
            pieces = self.pieces
            if len(pieces) != sizes[0]:
                raise Misfit
            for piece in pieces[1:]:
                unite(pieces[0], piece)
            count = Axis(sizes[0])
            count.fix("its parts are told apart by their number")
            return [count, *pieces[0].as_product(sizes[1:])]
        root._factors = [Axis(size) for size in sizes]
        self._pass_on(root, root._factors)
        return list(root._factors)

    def _as_pieces(self, sizes: list[int]) -> list[Axis]:
        root = self.root
        if root._factors:
            first, *rest = self.factors
            if len(set(sizes)) > 1 or first.size != len(sizes):
                raise Misfit
            first.fix("its parts are told apart by their number")
            return [composed(rest)] * len(sizes)
        root._pieces = [Axis(size) for size in sizes]
        self._pass_on(root, root._pieces)
        return list(root._pieces)

    @staticmethod
    def _pass_on(root: Axis, parts: list[Axis]) -> None:
        if root._fixed is not None:
            for part in parts:
                part.fix(root._fixed)


def composed(factors: Sequence[Axis]) -> Axis:
    """The product of several axes, the outermost first."""
    return factors[0] if len(factors) == 1 else Axis(math.prod(a.size for a in factors), factors=factors)


def _joined(pieces: Sequence[Axis]) -> Axis:
    return pieces[0] if len(pieces) == 1 else Axis(sum(a.size for a in pieces), pieces=pieces)


def unite(a: Axis, b: Axis) -> None:
    """Let two axes be the same.

    Raises:
        Misfit: they are composed in different ways.
    """
    a, b = a.root, b.root
    if a is b:
        return
    if a.size != b.size:
        raise Misfit
    if a._factors or a._pieces:
        a, b = b, a
    if a._factors or a._pieces:
        # Both are composed.
        if b._factors:
            ours, theirs = a.as_product([f.size for f in b.factors]), b.factors
        else:
            ours, theirs = a.as_pieces([p.size for p in b.pieces]), b.pieces
        for one, other in zip(ours, theirs, strict=True):
            unite(one, other)
    elif a._fixed is not None:
        b.fix(a._fixed)
    if a.root is not b.root:
        a.root._same = b.root


# Growing -------------------------------------------------------------------------------------------------------------

#: What makes an index new: which atoms have grown there, and its index along each.
Key = frozenset[tuple["Axis", int]]
#: How many indices atoms get in addition.
Growth = Mapping[Axis, int]


@dataclass(frozen=True)
class Grown:
    """An axis that has grown.

    Attributes:
        like: which index it had before, or else which one each is like, int64, shape (size now,).
        along: of each atom that has grown: the index along that of each, or -1 where it is no part, int64, shape
            (size now,).
    """

    like: Tensor
    along: dict[Axis, Tensor]

    @cached_property
    def is_new(self) -> Tensor:
        """Which indices were not there before, bool, shape (size now,)."""
        new = torch.zeros_like(self.like, dtype=torch.bool)
        for atom, index in self.along.items():
            new |= index >= atom.size
        return new

    @cached_property
    def place(self) -> Tensor:
        """Where each index has gone, int64, shape (size before,)."""
        return (~self.is_new).nonzero().squeeze(1)

    @cached_property
    def counts(self) -> Tensor:
        """How many indices there are in the place of each: itself, and what follows it, int64, shape (size before,)."""
        place = self.place
        return torch.cat((place, torch.tensor([len(self.like)]))).diff()

    @cached_property
    def keys(self) -> dict[int, Key]:
        """What makes each index new that is."""
        found: dict[int, Key] = {}
        for atom, along in self.along.items():
            for index in (along >= atom.size).nonzero().squeeze(1).tolist():
                found[index] = found.get(index, frozenset()) | {(atom, int(along[index]))}
        return found


def grown(axis: Axis, growth: Growth) -> Grown:
    """What becomes of an axis."""
    root = axis.root
    if root._factors:
        parts = [grown(factor, growth) for factor in root.factors]
        grid = torch.meshgrid(*(torch.arange(len(p.like)) for p in parts), indexing="ij")
        like = torch.zeros_like(grid[0])
        for part, factor, index in zip(parts, root.factors, grid, strict=True):
            like = like * factor.size + part.like[index]
        along: dict[Axis, Tensor] = {}
        for part, index in zip(parts, grid, strict=True):
            for atom, number in part.along.items():
                along[atom] = torch.maximum(along.get(atom, number.new_tensor(-1)), number[index].flatten())
        return Grown(like.flatten(), along)
    if root._pieces:
        parts, pieces = [grown(piece, growth) for piece in root.pieces], root.pieces
        firsts = [sum(p.size for p in pieces[:i]) for i in range(len(pieces))]
        atoms = {atom for part in parts for atom in part.along}
        return Grown(
            torch.cat([first + part.like for first, part in zip(firsts, parts, strict=True)]),
            {a: torch.cat([part.along.get(a, torch.full_like(part.like, -1)) for part in parts]) for a in atoms},
        )
    more, own = growth.get(root, 0), torch.arange(root.size)
    if not more:
        return Grown(own, {})
    # Like the last ones, over and over.
    like = torch.cat((own, root.size - 1 - torch.arange(more).flip(0) % root.size))
    return Grown(like, {root: torch.arange(root.size + more)})

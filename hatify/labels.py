"""Support labels: for every element of every activation, the condition under which it may be non-zero.

A label is an integer: ``ON`` (may always be non-zero), ``ZERO`` (is always zero), a *leaf* (non-zero only where that
feature of a layer or parameter is on), or, without coupling, a negative number that names a set of leaves (non-zero
only where one of them is on). Labels are stored in int64 tensors of the activation's shape whose constant dimensions
have stride 0, so a convolution's output costs as many labels as it has channels, whatever the image size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

ZERO = 0
ON = 1
FIRST_LEAF = 2
#: Leaves of raw parameters are numbered from here, so that they can be told from features of layers. All leaves are
#: below 2³¹, so that a pair of them fits one int64.
FIRST_RAW = 1 << 30
_NO_LEAF = 1 << 31


@dataclass(frozen=True)
class Leaves:
    """The leaves ``first … first + count - 1`` belong to the layer or parameter `owner`."""

    owner: str
    first: int
    count: int

    @property
    def all(self) -> Tensor:
        """Every one of them, shape (count,)."""
        return torch.arange(self.first, self.first + self.count)


class LabelSpace:
    """Hands out leaves, combines labels, and remembers which leaves have met.

    With ``couple=True`` features that meet are merged into one class (see `classes`), so a combination of two leaves
    is again a leaf. With ``couple=False`` only raw parameters merge with the features they meet; combinations of
    features are sets.
    """

    def __init__(self, couple: bool) -> None:
        self.couple = couple
        self.features: dict[str, Leaves] = {}
        self.raw: dict[str, Leaves] = {}
        self.raw_shapes: dict[str, torch.Size] = {}
        self._next_feature = FIRST_LEAF
        self._next_raw = FIRST_RAW
        self._edges: list[Tensor] = []
        self._set_of: dict[int, frozenset[int]] = {}
        self._name_of: dict[frozenset[int], int] = {}

    # Leaves ----------------------------------------------------------------------------------------------------------

    def feature_leaves(self, owner: str, count: int) -> Tensor:
        """The leaves of a layer's `count` output features, shape (count,); the same ones at each call."""
        if owner not in self.features:
            self.features[owner] = Leaves(owner, self._next_feature, count)
            self._next_feature += count
        first = self.features[owner].first
        return torch.arange(first, first + count)

    def raw_leaves(self, owner: str, shape: torch.Size) -> Tensor:
        """The leaves of a raw parameter's elements, one each, in the parameter's shape."""
        if owner not in self.raw:
            self.raw[owner] = Leaves(owner, self._next_raw, shape.numel())
            self.raw_shapes[owner] = shape
            self._next_raw += shape.numel()
        first = self.raw[owner].first
        return torch.arange(first, first + shape.numel()).view(shape)

    # Combinations ----------------------------------------------------------------------------------------------------

    def either(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of a sum: non-zero where `a` or `b` may be. Leaves that meet are coupled."""
        a, b = torch.broadcast_tensors(a, b)
        shape = a.shape
        a, b, spread = condensed_pair(a, b)
        combined = torch.where(a == ZERO, b, torch.where(b == ZERO, a, self._meet(a, b, union=True)))
        return spread(combined.masked_fill((a == ON) | (b == ON), ON)).expand(shape)

    def both(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of a product: non-zero only where `a` and `b` may both be. Leaves that meet are coupled."""
        a, b = torch.broadcast_tensors(a, b)
        shape = a.shape
        a, b, spread = condensed_pair(a, b)
        combined = torch.where(a == ON, b, torch.where(b == ON, a, self._meet(a, b, union=False)))
        return spread(combined.masked_fill((a == ZERO) | (b == ZERO), ZERO)).expand(shape)

    def meet(self, a: Tensor, b: Tensor) -> None:
        """Couple the leaves of `a` and `b`, element by element."""
        a, b, _ = condensed_pair(*torch.broadcast_tensors(a, b))
        self._meet(a, b, union=False)

    def _meet(self, a: Tensor, b: Tensor, union: bool) -> Tensor:
        """The label where two leaves or sets meet (elsewhere: `a`); for a product, either one bounds the support."""
        meeting = is_leaf(a) & is_leaf(b) & (a != b)
        if not meeting.any():
            return a
        from_raw = (a >= FIRST_RAW) | (b >= FIRST_RAW)
        coupled = meeting & (a > ZERO) & (b > ZERO) & (from_raw | self.couple)
        self._couple(a[coupled], b[coupled])
        result = torch.where(a >= FIRST_RAW, b, a)
        rest = meeting & ~coupled
        if union and rest.any():
            pairs, index = torch.stack((a[rest], b[rest])).unique(dim=1, return_inverse=True)
            unions = torch.tensor([self._union(x, y) for x, y in pairs.T.tolist()])
            result = result.masked_scatter(rest, unions[index])
        return result

    def _couple(self, a: Tensor, b: Tensor) -> None:
        self._edges.append((a << 32 | b).unique())

    def _union(self, x: int, y: int) -> int:
        if max(x, y) >= FIRST_RAW:
            return ON  # a set is not one feature, so a raw parameter cannot share its mask
        members = self.members(x) | self.members(y)
        name = self._name_of.setdefault(members, -1 - len(self._name_of))
        self._set_of[name] = members
        return name

    def members(self, label: int) -> frozenset[int]:
        """The leaves a leaf or set label stands for."""
        return self._set_of[label] if label < 0 else frozenset((label,))

    # Reductions ------------------------------------------------------------------------------------------------------

    def merge(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Labels of a reduction over `dims` (kept with size 1): ON if any is ON, else all that meet are coupled."""
        wanted = sorted({d % labels.ndim for d in dims}, reverse=True)
        shape = [1 if d in wanted else n for d, n in enumerate(labels.shape)]
        small = unexpanded(labels)
        kept = [d for d in range(small.ndim) if d not in wanted]
        columns = small.permute(*kept, *wanted).reshape(*(small.shape[d] for d in kept), -1)
        if columns.shape[-1] > 1:
            columns = self._merged(columns)
        result = columns.squeeze(-1)
        for d in sorted(wanted):
            result = result.unsqueeze(d)
        return result.expand(shape)

    def _merged(self, columns: Tensor) -> Tensor:
        """Merge the last dimension."""
        if not self.couple:
            different = columns.reshape(-1, columns.shape[-1]).unique(dim=1)
            return reduce(self.either, different.unbind(1)).view(*columns.shape[:-1], 1)
        on = (columns == ON).any(-1, keepdim=True)
        representative = columns.amax(-1, keepdim=True)
        lowest = columns.masked_fill(~is_leaf(columns), _NO_LEAF).amin(-1, keepdim=True)
        representative = torch.where(representative > ON, lowest, representative)
        meeting = is_leaf(columns) & (columns != representative) & ~on
        if meeting.any():
            self._couple(columns[meeting], representative.expand_as(columns)[meeting])
        return representative.masked_fill(on, ON)

    # Classes ---------------------------------------------------------------------------------------------------------

    def classes(self) -> Classes:
        """The classes of leaves that have met."""
        packed = torch.cat(self._edges) if self._edges else torch.empty(0, dtype=torch.int64)
        edges = torch.stack((packed >> 32, packed & (_NO_LEAF - 1)))
        features = self._next_feature
        raws = self._next_raw - FIRST_RAW

        def dense(ids: Tensor) -> Tensor:
            return torch.where(ids >= FIRST_RAW, ids - FIRST_RAW + features, ids)

        root = connected_components(features + raws, dense(edges))
        return Classes(root, features)


@dataclass(frozen=True)
class Classes:
    """Leaves after coupling: ``root`` maps each leaf to the first leaf of its class."""

    root: Tensor
    features: int

    def of(self, leaves: Tensor) -> Tensor:
        """The class of each leaf, named by the lowest feature leaf in it, or by ON for raw parameters on their own."""
        dense = torch.where(leaves >= FIRST_RAW, leaves - FIRST_RAW + self.features, leaves)
        roots = torch.where(is_leaf(leaves), self.root[dense.clamp(min=0)], leaves)
        return torch.where(roots >= self.features, ON, roots)


def connected_components(count: int, edges: Tensor) -> Tensor:
    """The lowest member of each node's component; `edges` has shape (2, number of edges)."""
    root = torch.arange(count)
    a, b = edges
    while True:
        low = torch.minimum(root[a], root[b])
        updated = root.clone()
        for end in (root[a], root[b]):
            updated.scatter_reduce_(0, end, low, "amin")
        while not torch.equal(hop := updated[updated], updated):
            updated = hop
        if torch.equal(updated, root):
            return root
        root = updated


def is_leaf(labels: Tensor) -> Tensor:
    """Where a label is a leaf or a set of leaves."""
    return (labels >= FIRST_LEAF) | (labels < ZERO)


def is_raw(labels: Tensor) -> bool:
    """Whether `labels` are all leaves of raw parameters."""
    return bool((unexpanded(labels) >= FIRST_RAW).all())


def unexpanded(labels: Tensor) -> Tensor:
    """`labels` with every dimension along which they are constant reduced to size 1."""
    for d, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1:
            first = labels.narrow(d, 0, 1)
            if stride == 0 or (torch.equal(first, labels.narrow(d, size - 1, 1)) and bool((labels == first).all())):
                labels = first
    return labels


def varying_dims(labels: Tensor) -> tuple[int, ...]:
    """The dimensions along which `labels` are not constant."""
    return tuple(d for d, n in enumerate(unexpanded(labels).shape) if n > 1)


def unexpanded_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two label tensors of one shape, with the dimensions along which both are constant reduced to size 1."""
    small_a, small_b = unexpanded(a), unexpanded(b)
    return torch.broadcast_tensors(small_a, small_b)


#: Labels of fewer elements are not worth looking for runs in.
_MANY = 1 << 16


def condensed_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """`unexpanded_pair`, with runs of equal slices along a dimension reduced to one each; and what undoes that.

    A class token makes labels differ between tokens; all patches behind it are one run.
    """
    a, b = unexpanded_pair(a, b)
    for d, size in enumerate(a.shape if a.numel() > _MANY else ()):
        lines = (x.movedim(d, -1)[(0,) * (x.ndim - 1)].unsqueeze(0) for x in (a, b))
        if size == 1 or _changes(*lines).sum() > size // 4:
            continue
        rows = [x.movedim(d, -1).reshape(-1, size) for x in (a, b)]
        run = torch.cat((torch.zeros(1, dtype=torch.int64), _changes(*rows).cumsum(0)))
        if run[-1] <= size // 4:
            first = torch.cat((torch.zeros(1, dtype=torch.int64), run.diff().nonzero().squeeze(1) + 1))
            return a.index_select(d, first), b.index_select(d, first), partial(torch.index_select, dim=d, index=run)
    return a, b, lambda c: c


def _changes(a: Tensor, b: Tensor) -> Tensor:
    """Where a column of `a` or `b`, both (rows, n), is not the one before it: bool, shape (n - 1,)."""
    return ((a[:, 1:] != a[:, :-1]) | (b[:, 1:] != b[:, :-1])).any(0)

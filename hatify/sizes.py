"""The example inputs at other sizes, wherever the network leaves sizes free: batches, lengths, edges of images."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

#: A dimension of an input: the number of the tensor among the inputs, and of the dimension in it.
Place = tuple[int, int]
#: Places that always have one size, as the batch has in all inputs.
Group = tuple[Place, ...]
Sizes = dict[Group, int]

#: From here on an edge is taken to be an image's, of which a smaller one is tried first: it costs less.
LARGE = 64
#: Inputs of more elements are not made larger only to see whether the batch may be.
MANY = 1 << 16
#: With more groups than these, not all combinations of them are tried.
FEW = 6


def larger(size: int) -> tuple[int, ...]:
    """Sizes to try instead of `size`, the first that works: they show what short inputs do not reach."""
    return () if size > LARGE else (2 * size, size + 1)


def smaller(size: int) -> tuple[int, ...]:
    """Likewise: they leave something out; or, of something large, at least are other ones."""
    if size <= LARGE:
        return tuple(range(size - 1, size // 2, -1))
    patches = (n for n in range(LARGE, 1, -1) if size % n == 0)
    return (size // 2, size - 32, *(size - n for n in patches), size + 1)


def smallest(size: int) -> tuple[int, ...]:
    """Likewise: they leave out what can be."""
    return () if size > LARGE else tuple(range(1, size // 2 + 1))


def other_sizes(accepts: Callable[[Any], bool], inputs: Any, batches: tuple[int, ...] = ()) -> Iterator[Any]:
    """`inputs` with all sizes that are free made larger, smaller, and as small as can be; then in other batches.

    What is in them is repeated or cropped, so that indices stay ones that the network knows.

    Args:
        accepts: whether the network answers given inputs.
        inputs: tensors in any container; their first dimension is the batch.
        batches: sizes of batches to try besides.
    """
    leaves, structure = tree_flatten(inputs)

    def resized(sizes: Sizes) -> Any:
        changed = list(leaves)
        for i, dim, size in ((i, dim, size) for group, size in sizes.items() for i, dim in group):
            t = changed[i]
            changed[i] = t.index_select(dim, torch.arange(size, device=t.device) % t.shape[dim])
        return tree_unflatten(changed, structure)

    def free(sizes: Sizes) -> bool:
        # A size that is refused is nothing to report; torch.fx would print where.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return accepts(resized(sizes))

    tensors = {i: t for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.ndim and t.shape[0]}
    if not tensors:
        return
    batch = next(iter(tensors.values())).shape[0]
    in_batch = tuple((i, 0) for i, t in tensors.items() if t.shape[0] == batch)
    sizes: Sizes = {in_batch: batch}
    sizes |= {((i, d),): t.shape[d] for i, t in tensors.items() for d in range(t.ndim) if (i, d) not in in_batch}
    sizes = {group: size for group, size in sizes.items() if size}
    elements = sum(t.numel() for t in tensors.values())
    # On a GPU, an index beyond a table ends the process rather than the attempt.
    safe = all(t.device.type in ("cpu", "meta") for t in tensors.values())
    varied: set[Group] = set()
    for candidates in (larger, smaller, smallest) if safe else (smaller, smallest):
        found = _all_free(free, {group: n for group, n in sizes.items() if group != in_batch}, candidates)
        tied = {group: n for group, n in sizes.items() if group not in found}
        found |= _equal(free, found, tied, candidates)
        alone = not found
        if in_batch not in found and (found or candidates is smaller or elements <= MANY):
            others = ({in_batch: n} for n in _other_batches(batch, candidates, alone))
            found |= next((other for other in others if free(found | other)), {})
        tried = {group: n for group, n in sizes.items() if candidates(n)}
        varied |= found.keys()
        related = _in_proportion(free, tried, tried.keys() - varied, candidates)
        yield from (resized(changed) for changed in (found, related) if changed and (elements <= MANY or not alone))
    for size in batches:
        if free({in_batch: size}):
            yield resized({in_batch: size})


def _other_batches(batch: int, candidates: Callable[[int], tuple[int, ...]], alone: bool) -> tuple[int, ...]:
    """Batches to try; with nothing else to vary, the first dimension may be one of positions."""
    if candidates is larger:
        return (2 * batch, batch + 1) if alone else (batch + 1,)
    if candidates is smaller:
        return (batch - 1,) if batch > 1 else (batch + 1,)
    return (1,) if alone and batch > 2 else ()


def _all_free(free: Callable[[Sizes], bool], sizes: Sizes, candidates: Callable[[int], tuple[int, ...]]) -> Sizes:
    """As many places as can be changed one by one, each to the first candidate that works with those before.

    Last dimensions come first: features, which come first in images, are refused by the first layer at no cost.
    """
    found: Sizes = {}
    for group, size in reversed(sizes.items()):
        chosen = next((n for n in candidates(size) if free({**found, group: n})), None)
        found |= {} if chosen is None else {group: chosen}
    return found


def _equal(
    free: Callable[[Sizes], bool], found: Sizes, tied: Sizes, candidates: Callable[[int], tuple[int, ...]]
) -> Sizes:
    """Places of one size that can only be changed together."""
    more: Sizes = {}
    for size in dict.fromkeys(tied.values()):
        groups = [group for group, n in tied.items() if n == size]
        if len(groups) > 1:
            tries = (n for n in candidates(size) if free({**found, **more, **dict.fromkeys(groups, n)}))
            more |= {group: n for n in [next(tries, None)] if n is not None for group in groups}
    return more


def _in_proportion(
    free: Callable[[Sizes], bool], sizes: Sizes, refused: set[Group], candidates: Callable[[int], tuple[int, ...]]
) -> Sizes:
    """Places of different sizes, some of which are `refused` by themselves, changed in relation to each other.

    All by one factor, all by one difference, or one as a power of the other.
    """
    for groups in _combinations(sizes):
        if refused.isdisjoint(groups) or len({sizes[g] for g in groups}) == 1:
            continue
        first = min(sizes[g] for g in groups)
        for size in candidates(first):
            scaled = {g: sizes[g] * size / first for g in groups}
            shifted = {g: float(sizes[g] + size - first) for g in groups}
            powers = {g: next((float(size**k) for k in (1, 2, 3) if first**k == sizes[g]), 0.5) for g in groups}
            for wanted in (scaled, shifted, powers):
                found = {g: int(n) for g, n in wanted.items() if n >= 1 and n.is_integer()}
                if len(found) == len(groups) and free(found):
                    return found
    return {}


def _combinations(sizes: Sizes) -> Iterator[tuple[Group, ...]]:
    """Groups to change together, the most first; of many, those that are the same dimensions of their inputs."""
    if len(sizes) <= FEW:
        for count in range(len(sizes), 1, -1):
            yield from combinations(sizes, count)
        return
    dims = sorted({dim for group in sizes for _, dim in group})
    for count in range(len(dims), 0, -1):
        for chosen in combinations(dims, count):
            yield tuple(group for group in sizes if all(dim in chosen for _, dim in group))

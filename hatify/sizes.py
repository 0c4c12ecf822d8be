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

#: From here on an edge is taken to be an image's, of which a smaller one is tried first: it costs less.
LARGE = 64


def larger(size: int) -> tuple[int, ...]:
    """Sizes to try instead of `size`, the first that works: they show what short inputs do not reach."""
    return () if size > LARGE else (2 * size, size + 1)


def smaller(size: int) -> tuple[int, ...]:
    """Likewise: they leave something out; or, of something large, at least are other ones."""
    return (size // 2, size - 32, size + 1) if size > LARGE else tuple(range(size - 1, size // 2, -1))


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

    def resized(sizes: dict[Place, int]) -> Any:
        changed = list(leaves)
        for (i, dim), size in sizes.items():
            t = changed[i]
            changed[i] = t.index_select(dim, torch.arange(size, device=t.device) % t.shape[dim])
        return tree_unflatten(changed, structure)

    def free(sizes: dict[Place, int]) -> bool:
        # A size that is refused is nothing to report; torch.fx would print where.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return accepts(resized(sizes))

    tensors = {i: t for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.ndim and t.shape[0]}
    if not tensors:
        return
    batch = next(iter(tensors.values())).shape[0]
    in_batch = [(i, 0) for i, t in tensors.items() if t.shape[0] == batch]
    places = [(i, d) for i, t in tensors.items() for d in range(t.ndim) if (i, d) not in in_batch and t.shape[d]]
    # On a GPU, an index beyond a table ends the process rather than the attempt.
    safe = all(t.device.type in ("cpu", "meta") for t in tensors.values())
    sizes = {place: leaves[place[0]].shape[place[1]] for place in places}
    for candidates in (larger, smaller, smallest) if safe else (smaller, smallest):
        found = _all_free(free, sizes, candidates)
        more = found | dict.fromkeys(in_batch, batch + 1)
        if found and candidates is larger and free(more):
            found = more
        tied = _in_proportion(free, sizes, sizes.keys() - found.keys(), candidates)
        yield from (resized(changed) for changed in (found, tied) if changed)
    for size in batches:
        if free(dict.fromkeys(in_batch, size)):
            yield resized(dict.fromkeys(in_batch, size))


def _all_free(
    free: Callable[[dict[Place, int]], bool], sizes: dict[Place, int], candidates: Callable[[int], tuple[int, ...]]
) -> dict[Place, int]:
    """As many places as can be changed together, each to the first candidate that works with those before.

    Last dimensions come first: features, which come first in images, are refused by the first layer at no cost.
    """
    found: dict[Place, int] = {}
    refused: dict[int, list[Place]] = {}
    for place, size in reversed(sizes.items()):
        chosen = next((n for n in candidates(size) if free({**found, place: n})), None)
        if chosen is None:
            refused.setdefault(size, []).append(place)
        else:
            found[place] = chosen
    for size, together in refused.items():
        if len(together) > 1:
            chosen = next((n for n in candidates(size) if free({**found, **dict.fromkeys(together, n)})), None)
            found |= {} if chosen is None else dict.fromkeys(together, chosen)
    return found


#: With more places than these, not all combinations of them are tried.
FEW = 6


def _in_proportion(
    free: Callable[[dict[Place, int]], bool],
    sizes: dict[Place, int],
    refused: set[Place],
    candidates: Callable[[int], tuple[int, ...]],
) -> dict[Place, int]:
    """Places of different sizes, some of which are `refused` by themselves: all by one factor, or by one difference."""
    if len(sizes) > FEW:
        return {}
    for count in range(len(sizes), 1, -1):
        for places in combinations(sizes, count):
            if refused.isdisjoint(places) or len({sizes[p] for p in places}) == 1:
                continue
            first = sizes[places[0]]
            for size in candidates(first):
                scaled = {p: sizes[p] * size / first for p in places}
                shifted = {p: float(sizes[p] + size - first) for p in places}
                for wanted in (scaled, shifted):
                    found = {p: int(n) for p, n in wanted.items() if n >= 1 and n.is_integer()}
                    if len(found) == count and free(found):
                        return found
    return {}

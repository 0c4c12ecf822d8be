"""What the analysis found at several sizes of the inputs, made one: what they disagree about is not concluded."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor, fx

from hatify.labels import ON, ZERO, Classes, LabelSpace
from hatify.ops.registry import Findings, Masked


def agree_on_reads(findings: Findings, classes: Classes) -> None:
    """Settle what each call of a weighted layer reads: ON where sizes disagree, or where there was nothing to read.

    Where they disagree about one feature, all are ON: positions are padded or cropped to a fixed number, and which
    ones hold what at sizes that were not tried cannot be told.
    """
    for (owner, node), (features, labels) in findings.read_at.items():
        if not labels or (owner, node) in findings.starved:
            labels = [torch.full((features,), ON)]
        first, *others = (_named(label, classes) for label in labels)
        agreed = all(torch.equal(first, other) for other in others)
        findings.reads.setdefault(owner, []).append(labels[0] if agreed else torch.full((features,), ON))


def agree_on_masks(findings: Findings, classes: Classes) -> set[fx.Node]:
    """Settle the mask of each node; returns those that would need another one at another size."""
    disagreeing = set()
    for node, asked in findings.asked.items():
        first = asked[0]
        same = all(
            other[1:] == first[1:] and torch.equal(_named(other.labels, classes), _named(first.labels, classes))
            for other in asked[1:]
        )
        if first.own or (same and all(_fits(first, shape) for shape in findings.shapes[node])):
            findings.masks[node] = first
        else:
            disagreeing.add(node)
    return disagreeing


def _fits(masked: Masked, shape: torch.Size) -> bool:
    """Whether a mask lies in an output of this shape."""
    if isinstance(masked.dim, int):
        return len(shape) == masked.ndim and shape[masked.dim] == len(masked.labels)
    return all(
        size in (1, other) for size, other in zip(masked.dim, shape[len(shape) - len(masked.dim) :], strict=True)
    )


def _named(labels: Tensor, classes: Classes) -> Tensor:
    """`labels` with the same number for leaves of one class."""
    return torch.where(labels < ZERO, labels, classes.of(labels.clamp(min=ZERO)))


def agree_on_tables(space: LabelSpace, findings: Findings, classes: Classes) -> frozenset[str]:
    """Continue the labels of raw parameters of which only parts were read; returns the names of those that defy it.

    The rows of a table of positions are read one by one: what is true of those that were read is taken to be true of
    all, if it follows from the place along some of the table's dimensions. A parameter that is masked where it is read
    keeps to its mask whatever it meets; that what it meets keeps to it as well is the point.
    """
    seen = torch.cat(findings.seen).unique() if findings.seen else torch.empty(0, dtype=torch.int64)
    defying = set()
    for owner, leaves in space.raw.items():
        shape = space.raw_shapes[owner]
        labels = classes.of(leaves.all).view(shape)
        if not (labels > ON).any():
            continue
        read = torch.isin(leaves.all, seen).view(shape)
        # What was read without meeting features is better masked like the rest, if the rest says how.
        continued = continuation(labels, read & (labels > ON)) if bool((labels == ON).any()) else labels
        if continued is None:
            continued = labels if read.all() else continuation(labels, read)
        if continued is None:
            defying.add(owner)
        else:
            findings.continued[owner] = continued
    return frozenset(defying)


def continuation(labels: Tensor, known: Tensor) -> Tensor | None:
    """`labels` with what is not `known` filled in, by the fewest dimensions that the known ones follow from.

    None if there are none, or if there are places along them at which nothing is known.
    """
    dims = [d for d, size in enumerate(labels.shape) if size > 1]
    for count in range(len(dims) + 1):
        for chosen in combinations(dims, count):
            others = [d for d in range(labels.ndim) if d not in chosen]
            rows = math.prod(labels.shape[d] for d in chosen)
            lines, shown = (t.permute(*chosen, *others).reshape(rows, -1) for t in (labels, known))
            if not shown.any(1).all():
                continue
            first = lines.gather(1, shown.to(torch.uint8).argmax(1, keepdim=True))
            if ((lines == first) | ~shown).all():
                return first.view([n if d in chosen else 1 for d, n in enumerate(labels.shape)]).expand(labels.shape)
    return None

"""The registry of operation rules: how support labels pass through each kind of node.

A rule is a function from a `Call` to the labels of the call's output. Register it with the functions, tensor method
names and module types it is for::

    @rule(torch.relu, F.relu, "relu", nn.ReLU)
    def zero_preserving(call):
        return call.label(0)

Rules may be conservative but never optimistic: `ON` is always a correct answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from hatify.free import Free
from hatify.labels import ON, ZERO, LabelSpace, compact, is_leaf, varying_dims

#: Labels of a node's output: a tensor, None for what is no tensor, or a container of these like the output's.
Labels = Any
Rule = Callable[["Call"], Labels]

RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for functions, tensor method names (strings) and module types (exactly these types)."""

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


class Masked(NamedTuple):
    """A mask on a node's output."""

    labels: Tensor  #: of the features, shape (features,)
    dim: int | tuple[int, ...]  #: where they lie; for several dimensions, the shape in which the mask broadcasts
    ndim: int  #: how many dimensions the output has
    own: bool = False  #: of a weighted layer or an input, which cannot do without


@dataclass
class Findings:
    """What the analysis learns about the nodes of a graph, and about raw parameters and buffers.

    What is found at each size of the inputs comes first; `hatify.agreement` makes one of it.
    """

    #: What the network leaves free.
    free: Free = field(default_factory=Free)
    #: Labels of the input features that a weighted layer's call reads, at each size, and how many features these are:
    #: {(parameter or module, node): (I, [labels (I,), …])}.
    read_at: dict[tuple[str, fx.Node], tuple[int, list[Tensor]]] = field(default_factory=dict)
    #: Those to which nothing was given at the size of the example, or at a larger one.
    starved: set[tuple[str, fx.Node]] = field(default_factory=set)
    #: The masks that nodes are to have, at each size at which they need one.
    asked: dict[fx.Node, list[Masked]] = field(default_factory=dict)
    #: The shapes of outputs, at each size.
    shapes: dict[fx.Node, list[torch.Size]] = field(default_factory=dict)
    #: Leaves of entries of raw parameters that something was computed from, at any size.
    seen: list[Tensor] = field(default_factory=list)
    #: Raw parameters of which parts stay unread at all sizes, and whose other parts do not tell what these would meet.
    whole: frozenset[str] = frozenset()
    #: The labels of raw parameters where they do, in the parameter's shape.
    continued: dict[str, Tensor] = field(default_factory=dict)
    #: Labels of the input features that each call of a weighted layer reads: {parameter or module: [labels (I,), …]}.
    reads: dict[str, list[Tensor]] = field(default_factory=dict)
    #: The masks that nodes get.
    masks: dict[fx.Node, Masked] = field(default_factory=dict)
    #: Of matrix products whose rows and columns are both features: the labels that the product's own do not tell.
    across: dict[fx.Node, Tensor] = field(default_factory=dict)
    #: Labels of features that end in the weights with which others are summed, such as attention's heads.
    weighing: list[Tensor] = field(default_factory=list)
    #: Buffers that the forward pass writes to.
    moving: set[str] = field(default_factory=set)
    #: Nodes whose output meets a function that is infinite, or infinitely steep, at zero.
    steep: set[fx.Node] = field(default_factory=set)
    #: Layers whose weight is smaller than their output, so that masking the weight costs less.
    fold: dict[str, bool] = field(default_factory=dict)
    #: Parameters whose entries do not act on features one by one.
    opaque: set[str] = field(default_factory=set)


@dataclass
class Call:
    """One node being analysed: its arguments, its output, and the labels of its arguments."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: nn.Module | None
    space: LabelSpace
    findings: Findings
    labels_of: Callable[[Any], Labels]
    #: Parameters that are the weight of an output layer.
    output_weights: frozenset[str] = frozenset()
    #: Whether a mask here would do harm.
    never_masked: bool = False
    #: Whether sizes disagree about the mask that would be needed here.
    unsure: bool = False
    #: Whether the inputs are smaller than the example's.
    shrunk: bool = False

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The value of an argument, by position or name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def given(self, position: int, name: str) -> Any:
        """The graph's argument itself (a node or a constant)."""
        node_args = self.node.args
        return node_args[position] if position < len(node_args) else self.node.kwargs.get(name)

    def label(self, position: int, name: str = "input") -> Labels:
        """The labels of an argument."""
        return self.labels_of(self.given(position, name))

    @property
    def free(self) -> Free:
        """What the network leaves free."""
        return self.findings.free

    @property
    def is_empty(self) -> bool:
        """Whether a tensor that goes in holds nothing at this size, so that its labels tell nothing of others."""
        return any(isinstance(t, Tensor) and not t.numel() for t in tree_leaves((self.args, self.kwargs)))

    def reads(self, owner: str, features: int, labels: Tensor | None) -> None:
        """Note what a weighted layer reads: labels (features,), or None where it was given nothing."""
        _, found = self.findings.read_at.setdefault((owner, self.node), (features, []))
        if labels is not None:
            found.append(labels)
        elif not self.shrunk:
            self.findings.starved.add((owner, self.node))

    def all_on(self, like: Any = None) -> Labels:
        """``ON`` for every tensor of the output."""
        return constant_labels(self.out if like is None else like, ON)

    def mask(self, labels: Tensor, zero_stays: bool = False, needed: bool = False) -> Tensor:
        """Ask for a mask on this node's output, so that its support becomes `labels`; ON where that cannot be.

        A mask can be inserted where the features lie along one dimension, or along several with one at each place, such
        as (heads, features of a head). Labels that hold no leaf need none. What was always zero is ON afterwards,
        unless the operation maps zero to zero there. A mask that is `needed`, since without it there would be no
        number, is put where others would do harm.
        """
        out = self.out
        harmful = self.unsure or (self.never_masked and not needed)
        if labels.shape != out.shape or harmful or not (out.is_floating_point() or out.is_complex()):
            return self.all_on()
        if not zero_stays:
            labels = torch.where(compact(labels) == ZERO, ON, compact(labels)).expand(out.shape)
        dims = varying_dims(labels)
        if not is_leaf(compact(labels)).any():
            return labels if len(dims) < 2 else self.all_on()
        dim: int | tuple[int, ...] = dims[0] if dims else out.ndim - 1
        vector = _along(labels, dims).reshape(-1)
        if out.ndim > 1 and _holds_samples(vector, dims, out.shape):
            return self.all_on()
        if len(dims) > 1:
            lines = (_along(labels, (d,)) for d in dims)  # few, and mostly enough to see that features repeat
            if dims[0] == 0 or not all(map(_different, (*lines, vector))):
                return self.all_on()
            dim = tuple(size if d in dims else 1 for d, size in enumerate(out.shape) if d >= dims[0])
        self.findings.asked.setdefault(self.node, []).append(Masked(vector, dim, out.ndim))
        return labels

    def mask_own(self, written: Tensor, dim: int) -> Tensor:
        """Ask for the mask of a weighted layer on its output, whose features `written` (O,) lie along `dim`."""
        ndim = self.out.ndim
        self.findings.asked.setdefault(self.node, []).append(Masked(written, dim % ndim, ndim, True))
        return written.view([-1 if d == dim % ndim else 1 for d in range(ndim)]).expand(self.out.shape)


def _along(labels: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`labels` at the first index of all dimensions but `dims`."""
    return labels[tuple(slice(None) if d in dims else 0 for d in range(labels.ndim))]


def _holds_samples(vector: Tensor, dims: tuple[int, ...], shape: torch.Size) -> bool:
    """Whether the features along a dimension are those of every sample again: (N, C, …) reshaped to (N·C, …)."""
    if dims == (0,):
        return not _different(vector)
    period = int((vector == vector[0]).nonzero()[1:2].sum()) or len(vector)
    tiles = len(vector) // period
    tiled = tiles > 1 and torch.equal(vector, vector[:period].repeat(tiles))
    return shape[0] == 1 and dims == (1,) and tiled


def _different(labels: Tensor) -> bool:
    return len(labels.unique()) == len(labels)


def behind(node: object, stop: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """`node` and what it is computed from, but for what lies behind nodes at which to `stop`."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if isinstance(current, fx.Node) and current not in seen:
            seen.add(current)
            yield current
            if not stop(current):
                waiting.extend(current.all_input_nodes)


def sources(node: object) -> Iterator[str]:
    """The parameters and buffers that `node` is computed from without a module in between."""
    return (str(n.target) for n in behind(node, lambda n: n.op == "call_module") if n.op == "get_attr")


def constant_labels(value: Any, label: int) -> Labels:
    """`label` for every tensor in `value`."""
    if isinstance(value, Tensor):
        return torch.full((1,) * value.ndim, label).expand(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(constant_labels(v, label) for v in value)
    if isinstance(value, dict):
        return {k: constant_labels(v, label) for k, v in value.items()}
    return None


def scalar_label(value: Any) -> Tensor:
    """The label of a Python number: zero or not."""
    return torch.tensor(ZERO if value == 0 else ON)

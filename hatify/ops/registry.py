"""The registry of operations: all that is known of each, in one record.

A record says how support labels pass through an operation (a function from a `Call` to the labels of the output), of
what kind it is (each a `Trait`), and how it does without features that a task has off. Register it with the functions,
tensor method names and module types it is for::

    @op(torch.relu, F.relu, "relu", nn.ReLU, traits={Trait.ELEMENTWISE}, cut=alike)
    def zero_preserving(call):
        return call.label(0)

Labels may be conservative but never optimistic: `ON` is always a correct answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from hatify.axes import Axes, Moves, Name, Names
from hatify.free import Free
from hatify.labels import ON, ZERO, LabelSpace, is_leaf, unexpanded, varying_dims
from hatify.nn.connection import WeightedCall

#: Labels of a node's output: a tensor, None for what is no tensor, or a container of these like the output's.
Labels = Any
Rule = Callable[["Call"], Labels]
#: How the axes around a call belong together; None: nothing can be taken out of them.
Cut = Callable[["Call"], Axes | Moves | None]
#: Target and arguments of a call in a network that has lost indices, from those it would have otherwise.
Resize = Callable[["Resizing"], "Rewritten"]
#: The weighted layer that a node calls, given the network.
AsLayer = Callable[[fx.Node, nn.Module], WeightedCall | None]
Rewritten = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Resizing:
    """A call that is being rewritten.

    Attributes:
        node: the call.
        args: its arguments in the new graph.
        kwargs: the same.
        source: what is kept of its first operand.
        out: what is kept of its output, in the structure of that.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: Any
    out: Any


class Trait(Enum):
    """What kind of operation it is."""

    #: An element of the output is made of those of the operands at the same place (and perhaps of statistics).
    ELEMENTWISE = auto()
    #: Elements of the output are elements of the input, at other places, or something constant beside them.
    MOVES = auto()
    #: Moves, but leaves everything in its order, whatever sizes it is given.
    KEEPS_ORDER = auto()
    #: Moves by the shape of another operand, not by its values.
    BY_SHAPE = auto()
    #: An element of the output is a statistic of many of the input.
    STATISTIC = auto()
    #: May come between an output layer and the output: makes no features that another layer would read.
    AFTER_HEADS = auto()
    #: Makes a tensor from sizes.
    FACTORY = auto()


class Along(NamedTuple):
    """The argument that says along which dimension an operation reads, or joins."""

    position: int
    name: str
    default: int | None = None


@dataclass(frozen=True)
class Operation:
    """All that is known of an operation.

    Attributes:
        labels: how support labels pass through it.
        traits: what kind of operation it is.
        cut: how the axes around it belong together; None: it needs everything.
        resize: how its arguments change where sizes and positions have; None: not at all.
        singular: its operands, given its node, at which it is infinite, or infinitely steep, at zero.
        reads: of a movement, the dimension along which it reads; None: any.
        joins: of a movement that joins tensors, the dimension along which it does.
        layer: the weighted layer that a node of a network calls by it; None: none.
    """

    labels: Rule
    traits: frozenset[Trait] = frozenset()
    cut: Cut | None = None
    resize: Resize | None = None
    singular: Callable[[fx.Node], Iterable[Any]] | None = None
    reads: Along | None = None
    joins: Along | None = None
    layer: AsLayer | None = None


#: Every operation that is known, by function, method name or module type.
OPERATIONS: dict[Any, Operation] = {}


def op(
    *targets: Any,
    traits: Iterable[Trait] = (),
    cut: Cut | None = None,
    resize: Resize | None = None,
    singular: Callable[[fx.Node], Iterable[Any]] | None = None,
    reads: Along | None = None,
    joins: Along | None = None,
    layer: AsLayer | None = None,
) -> Callable[[Rule], Rule]:
    """Register what is known of functions, tensor methods (by name) and modules (of exactly these types).

    The function below it says how support labels pass through; for the arguments, see `Operation`. A function or module
    that is registered is called as a whole in the graph, not traced through.

    Raises:
        ValueError: a target is registered already, or is none: names the target.
    """

    def register(labels: Rule) -> Rule:
        record = Operation(labels, frozenset(traits), cut, resize, singular, reads, joins, layer)
        for target in targets:
            _check_target(target)
            OPERATIONS[target] = record
        return labels

    return register


def _check_target(target: Any) -> None:
    method = isinstance(target, str)
    if method and not hasattr(Tensor, target):
        raise ValueError(f"{target!r} is no method of torch.Tensor")
    if not method and not callable(target):
        raise ValueError(f"{target!r} is no function, method name or type of modules")
    if isinstance(target, type) and not issubclass(target, nn.Module):
        raise ValueError(f"{target.__name__} is no type of modules")
    if target in OPERATIONS:
        raise ValueError(f"{getattr(target, '__name__', target)!r} is registered already")


def operation_of(node: fx.Node, module: nn.Module | None = None) -> Operation | None:
    """What is known of the operation at `node`, which calls `module` or is no call of a module."""
    if node.op == "call_module":
        return None if module is None else OPERATIONS.get(type(module))
    return OPERATIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def has_trait(node: fx.Node, *traits: Trait) -> bool:
    """Whether `node` calls a function or method with any of these traits."""
    known = operation_of(node)
    return known is not None and not known.traits.isdisjoint(traits)


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
    #: Nodes whose value is another one at other times: parameters, which are trained, and random numbers.
    unsteady: set[fx.Node] = field(default_factory=set)
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
    #: Normalisations written as functions that take their mask inside.
    inside: set[fx.Node] = field(default_factory=set)


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
    #: The value of a node.
    value_of: Callable[[fx.Node], Any]
    #: Whether a mask here would do harm.
    never_masked: bool = False
    #: Whether sizes disagree about the mask that would be needed here.
    unsure: bool = False
    #: Whether the inputs are smaller than the example's.
    shrunk: bool = False
    #: What is known of the operation.
    operation: Operation | None = None

    def has_trait(self, trait: Trait) -> bool:
        """Whether the operation is known to be of this kind."""
        return self.operation is not None and trait in self.operation.traits

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

    def axes(
        self,
        operands: Iterable[tuple[Any, Names]],
        *outs: Names,
        whole: Iterable[Name] = (),
        filled: Iterable[Name] = (),
        **more: Any,
    ) -> Axes | None:
        """Operands, and the tensors of the output, with the names of their dimensions; None where sizes disagree."""
        given = [(n, names) for n, names in operands if isinstance(n, fx.Node)]
        made = [t for t in tree_leaves(self.out) if isinstance(t, Tensor)]
        values = [*(self.value_of(n) for n, _ in given), *made]
        if not given or len(made) != len(outs) or not all(isinstance(v, Tensor) for v in values):
            return None
        sizes: dict[Name | None, int] = {}
        found: list[Names] = []
        for value, names in zip(values, (*(names for _, names in given), *outs), strict=True):
            if value.ndim != len(names):
                return None
            found.append(tuple(None if size == 1 else n for n, size in zip(names, value.shape, strict=True)))
            for name, size in zip(found[-1], value.shape, strict=True):
                if name is not None and sizes.setdefault(name, size) != size:
                    return None
        names_of: dict[fx.Node, Names] = {}
        for (node, _), names in zip(given, found, strict=False):
            if names_of.setdefault(node, names) != names:
                return None
        return Axes(tuple(names_of.items()), tuple(found[len(given) :]), frozenset(whole), frozenset(filled), **more)

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
            labels = torch.where(unexpanded(labels) == ZERO, ON, unexpanded(labels)).expand(out.shape)
        dims = varying_dims(labels)
        if not is_leaf(unexpanded(labels)).any():
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

    def mask_own(self, written: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Ask for the mask of a weighted layer on its output, whose features `written` (O,) lie along `dims`."""
        ndim = self.out.ndim
        places = [d % ndim for d in dims]
        view = [size if d in places else 1 for d, size in enumerate(self.out.shape)]
        dim = places[0] if len(places) == 1 else tuple(view[places[0] :])
        self.findings.asked.setdefault(self.node, []).append(Masked(written, dim, ndim, True))
        return written.view(view).expand(self.out.shape)


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


def alike(call: Call) -> Axes | None:
    """An elementwise operation: dimensions are aligned at the last one."""
    tensors = [n for n in call.node.all_input_nodes if isinstance(call.value_of(n), Tensor)]
    return call.axes([(n, aligned(call.value_of(n))) for n in tensors], aligned(call.out))


def aligned(value: Any) -> Names:
    """Names for the dimensions of a tensor that say how far from the last they are."""
    return tuple(range(-value.ndim, 0)) if isinstance(value, Tensor) else ()


def like_input(call: Call) -> Labels:
    """An operation without a rule whose output has the features of its input where they were: mask them again."""
    labels = call.label(0, next(iter(call.node.kwargs), "input"))
    if not isinstance(call.out, Tensor) or not isinstance(labels, Tensor) or labels.ndim != call.out.ndim:
        return call.all_on()
    dims = varying_dims(labels)
    kept = tuple(d for d in dims if labels.shape[d] == call.out.shape[d])
    if len(kept) == 1 < len(dims):
        # Positions have become others, as where a table of them is resampled.
        labels, dims = call.space.merge(labels, set(dims) - set(kept)), kept
    if len(dims) != 1 or not kept:
        return call.all_on()
    vector = labels[tuple(slice(None) if d in dims else slice(1) for d in range(labels.ndim))]
    return call.mask(vector.expand(call.out.shape))
